"""The command line: what it says, what it refuses, and what it does not load."""

import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.cli import find_intruder
from launcher.plan import make_plan
from tests.support import ROOT, command_environment, from_zygote, shardline, write_empty_checkpoint
from trainer.attempt import begin_attempt
from trainer.run_folder.folder import RunFolder

pytestmark = pytest.mark.timeout(60)

HEAVY = ("torch", "transformers", "datasets", "wandb", "tokenizers", "pandas", "pyarrow")


def test_help_names_every_command() -> None:
    finished = shardline("--help")
    assert finished.returncode == 0
    for command in ("init", "run", "parity", "export", "generate", "bench", "data", "checkpoint"):
        assert f" {command} " in finished.stdout


@pytest.fixture
def no_threads_are_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a user leaves their number to Shardline."""
    monkeypatch.delenv("OMP_NUM_THREADS")


@pytest.mark.usefixtures("no_threads_are_chosen")
def test_dry_run_shows_the_plan_and_writes_nothing(config_file: Path) -> None:
    finished = shardline(
        "run", config_file, "--dry-run", "--nproc-per-node", "3", "batch.micro_size=2", CUDA_VISIBLE_DEVICES=""
    )
    assert finished.returncode == 0, finished.stderr
    lines = finished.stdout.splitlines()
    assert "ranks         3 (CPU, gloo), torch zero2, data-parallel degree 3" in lines
    assert "batch         12 samples = 2 x 2 accumulation steps x 3 ranks" in lines
    assert "tokens        384 a step, 2,304 in 6 steps" in lines
    assert [line[:14].strip() for line in lines[4:8]] == ["parameters", "memory", "corpus", "continues"]
    assert any(line.startswith("  OMP_NUM_THREADS=") and "    # " in line for line in lines)
    assert lines[-1].endswith(f"-m trainer {config_file} batch.micro_size=2")
    assert list(config_file.parent.iterdir()) == [config_file]


def test_dry_run_is_one_json_document_for_programs(config_file: Path) -> None:
    finished = shardline(
        "train", config_file, "--dry-run", "--json", "--nproc-per-node", "3", "batch.micro_size=2",
        CUDA_VISIBLE_DEVICES="",
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    plan = json.loads(finished.stdout)
    assert (plan["num_ranks"], plan["accumulation_steps"], plan["tokens_per_step"], plan["num_steps"]) == (3, 2, 384, 6)
    assert plan["model"] == "llama"
    assert plan["num_parameters"] > 0
    assert (plan["continues_after"], plan["is_complete"]) == (None, False)
    assert plan["command"][-2:] == [str(config_file), "batch.micro_size=2"]
    finished = shardline("run", config_file, "--json")
    assert (finished.returncode, finished.stdout) == (2, "")
    assert finished.stderr == "error: --json is for what --dry-run shows; add --dry-run, or leave --json out.\n"


def test_what_cannot_run_is_found_before_the_corpus_is_read(tmp_path: Path, make_config: Callable[..., Path]) -> None:
    config = make_config()
    cache = f"data.cache_dir={tmp_path / 'cache'}"
    for override, sentence in [
        ("model.architecture=nowhere", "model.architecture=nowhere"),
        ("model.config.num_key_value_heads=2", "num_key_value_heads=2 does not divide its num_attention_heads=3"),
        ("data.tokenizer=./nofolder", "data.tokenizer=./nofolder cannot be loaded"),
    ]:
        finished = shardline("run", config, cache, override)
        assert finished.returncode == 2, finished.stdout + finished.stderr
        assert sentence in finished.stderr
        assert len(finished.stderr.splitlines()) == 1
        assert not (tmp_path / "cache").exists()


def test_the_version_is_a_line_for_a_report_of_a_fault() -> None:
    finished = shardline("--version")
    assert finished.returncode == 0, finished.stderr
    assert re.fullmatch(r"shardline \S.*, torch \d\S*, transformers \d\S*, Python 3\.\d+\.\d+\S*\n", finished.stdout)


def test_words_are_completed() -> None:
    asked = {"_SHARDLINE_COMPLETE": "complete_bash", "COMP_WORDS": "shardline check", "COMP_CWORD": "1"}
    assert shardline(**asked).stdout.split() == ["checkpoint"]
    asked = {
        "_SHARDLINE_COMPLETE": "complete_bash",
        "COMP_WORDS": "shardline run x.yaml optimizer.l",
        "COMP_CWORD": "3",
    }
    assert "optimizer.lr=" in shardline(**asked).stdout.split()
    asked = {"_SHARDLINE_COMPLETE": "complete_bash", "COMP_WORDS": "shardline list --js", "COMP_CWORD": "2"}
    assert shardline(**asked).stdout.split() == ["--json"]


@pytest.mark.parametrize(("no_color", "expected"), [("", b"\x1b[1;31merror:\x1b[0m "), ("1", b"error: ")])
def test_errors_have_colour_on_a_terminal_alone(no_color: str, expected: bytes) -> None:
    reading, writing = pty.openpty()
    program = "from sharding.ranks.sentences import print_error; print_error('mind this')"
    environment = command_environment(NO_COLOR=no_color, TERM="xterm")
    subprocess.run([sys.executable, "-c", program], stderr=writing, cwd=ROOT, env=environment, check=True)
    assert os.read(reading, 4096) == expected + b"mind this\r\n"
    os.close(writing)
    os.close(reading)


def test_who_stops_reading_changes_no_status(config_file: Path) -> None:
    command = [sys.executable, "-m", "launcher", "run", str(config_file), "--dry-run"]
    reading, writing = os.pipe()
    os.close(reading)
    with from_zygote():
        finished = subprocess.run(
            command, stdout=writing, stderr=subprocess.PIPE, cwd=ROOT, env=command_environment(), check=False
        )
    os.close(writing)
    assert (finished.returncode, finished.stderr) == (0, b"")


@pytest.mark.usefixtures("no_threads_are_chosen")
@pytest.mark.parametrize(
    ("launcher", "agent", "variable"),
    [
        ("deepspeed", "-m deepspeed.launcher.launch ", "  DS_ACCELERATOR=cpu    # "),
        ("accelerate", "-m sharding.ranks.loopback accelerate.commands.launch ", "  OMP_NUM_THREADS="),
    ],
)
def test_dry_run_shows_each_launcher(config_file: Path, launcher: str, agent: str, variable: str) -> None:
    lines = make_plan(str(config_file), ["steps=9"], None, launcher).describe(None).splitlines()
    assert any(line.startswith(variable) for line in lines)
    assert agent in lines[-1]
    assert lines[-1].endswith(f"--module trainer {config_file} steps=9")


def test_a_mistake_is_one_sentence_and_status_2(config_file: Path) -> None:
    for arguments, sentence in [
        (("run", config_file, "optimiser.lr=1"), "unknown key optimiser; did you mean optimizer?"),
        (("run", config_file, "--launcher", "mpirun"), "--launcher mpirun is not known; choose one of torchrun, deep"),
        (("run", config_file, "parallel.strategy=none", "--nproc-per-node", "2"), "parallel.strategy=none runs on one"),
        (("slurm", "submit", config_file, "data.paths=[/nowhere]"), "data.paths: /nowhere names no file"),
        (("run", "nowhere.yaml"), "cannot read the configuration nowhere.yaml: No such file or directory"),
        (("bench", "everything"), "there is no benchmark everything; there are: throughput, scaling, "),
    ]:
        finished = shardline(*arguments)
        assert finished.returncode == 2, arguments
        assert finished.stdout == ""
        assert finished.stderr.startswith("error: ")
        assert sentence in finished.stderr
        assert "Traceback" not in finished.stderr
        assert len(finished.stderr.splitlines()) == 1


def test_a_complete_run_is_left_alone(config_file: Path, make_config: Callable[..., Path]) -> None:
    from trainer.config import load_config
    from trainer.config.rules import World

    config = load_config(config_file)
    folder = RunFolder(config.run_dir)
    begin_attempt(folder, config, World(2, has_gpu=False), [])
    write_empty_checkpoint(folder.checkpoint_path(6), 6)
    before = sorted(folder.path.rglob("*"))
    finished = shardline("run", config_file)
    assert finished.returncode == 0
    assert finished.stdout.startswith("run tiny is complete at step 6; nothing to do.")
    assert str(folder.checkpoint_path(6)) in finished.stdout
    assert "steps=12" in finished.stdout
    assert sorted(folder.path.rglob("*")) == before

    finished = shardline("run", config_file, "steps=5")
    assert finished.returncode == 2
    assert "steps=5 is less than the 6 steps" in finished.stderr


def test_the_launcher_loads_nothing_heavy(config_file: Path) -> None:
    program = (
        "import sys; sys.argv = ['shardline', 'run', sys.argv[1], '--dry-run']\n"
        "import launcher.run\n"
        "from launcher.cli import main\n"
        "try: main()\n"
        f"finally: print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    finished = subprocess.run(
        [sys.executable, "-c", program, str(config_file)],
        cwd=ROOT,
        env=command_environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert finished.stdout.splitlines()[-1] == "[]"


def test_init_copies_the_examples_and_overwrites_nothing(tmp_path: Path) -> None:
    target = tmp_path / "mine"
    finished = shardline("init", target)
    assert finished.returncode == 0, finished.stderr
    for source in (ROOT / "configs").glob("*.yaml"):
        assert (target / "configs" / source.name).read_bytes() == source.read_bytes()
    example = target / "configs" / "quickstart.yaml"
    example.write_text("mine")
    for other in (target / "configs").glob("*.yaml"):
        if other != example:
            other.unlink()
    finished = shardline("init", target)
    assert finished.returncode == 2
    assert f"{example} exists; choose another folder, nothing was written." in finished.stderr
    assert example.read_text() == "mine"
    assert list((target / "configs").glob("*.yaml")) == [example]


def test_a_package_of_the_same_name_in_the_working_folder_is_named(tmp_path: Path) -> None:
    assert find_intruder(ROOT) is None
    (tmp_path / "trainer").mkdir()
    (tmp_path / "trainer" / "__init__.py").write_text("")
    finished = subprocess.run(
        [sys.executable, "-c", "from launcher.cli import main; main()", "--help"],
        cwd=tmp_path,
        env=command_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 2
    assert finished.stderr.startswith(
        f"error: the package trainer would be taken from {tmp_path}/trainer/__init__.py, not"
    )


def test_an_installed_package_of_the_same_name_is_named(tmp_path: Path) -> None:
    (tmp_path / "site" / "sharding").mkdir(parents=True)
    (tmp_path / "site" / "sharding" / "__init__.py").write_text("")
    finished = subprocess.run(
        [sys.executable, "-c", "from launcher.cli import main; main()"],
        cwd=tmp_path,
        env=command_environment() | {"PYTHONPATH": os.pathsep.join([str(tmp_path / "site"), str(ROOT)])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 2
    assert finished.stderr.startswith(f"error: the package sharding would be taken from {tmp_path}/site/sharding/")


@pytest.mark.parametrize(
    ("arguments", "module", "passed"),
    [
        (("parity", "x.yaml", "steps=3"), "trainer.commands.parity", ["x.yaml", "steps=3"]),
        (
            ("export", "runs/a", "--to", "out", "--step", "4"),
            "trainer.commands.export",
            ["runs/a", "--to", "out", "--step", "4"],
        ),
        (
            ("generate", "runs/a", "--prompt", "-1 +", "--temperature", "0"),
            "trainer.commands.generate",
            ["runs/a", "--prompt", "-1 +", "--temperature", "0"],
        ),
        (
            ("export", "runs/a", "--to", "out", "--task", "own:Task", "--trust-remote-code"),
            "trainer.commands.export",
            ["runs/a", "--to", "out", "--task", "own:Task", "--trust-remote-code"],
        ),
        (
            ("export", "runs/a", "--to", "out", "--format", "onnx", "--dtype", "fp16"),
            "trainer.commands.export",
            ["runs/a", "--to", "out", "--format", "onnx", "--dtype", "fp16"],
        ),
        (("data", "prepare", "x.yaml", "seed=1"), "trainer.commands.prepare_data", ["x.yaml", "seed=1"]),
        (("data", "show", "runs/a", "--step", "3"), "trainer.commands.show_data", ["runs/a", "--step", "3"]),
        (("checkpoint", "list", "runs/a"), "trainer.commands.checkpoint_list", ["runs/a"]),
        (("checkpoint", "verify", "runs/a"), "trainer.commands.checkpoint_verify", ["runs/a"]),
        (("bench", "data", "--", "--steps", "3"), "benchmarks.data", ["--steps", "3"]),
    ],
)
def test_options_reach_the_modules_that_do_the_work(
    monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], module: str, passed: list[str]
) -> None:
    from launcher.commands import app

    became: list[list[str]] = []

    def become(path: str, argv: list[str], environment: dict[str, str]) -> None:
        assert environment["PYTHONSAFEPATH"] == "1"
        became.append(argv)
        raise SystemExit(0)

    monkeypatch.setattr(os, "execve", become)
    with pytest.raises(SystemExit):
        app(list(arguments))
    assert became == [[sys.executable, "-P", "-m", "sharding.ranks.quiet_end", module, *passed]]
