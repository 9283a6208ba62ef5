"""Mistakes of the user: one sentence, exit status 2, and nothing that exists is lost."""

import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.support import (
    ROOT,
    command_environment,
    read_metrics,
    refused,
    shardline,
    start_shardline,
    tiny_values,
    trained,
    wait_until,
    write_config,
)
from trainer.attempt import check_continuation
from trainer.config import load_config
from trainer.data.prepared import find_prepared
from trainer.run_folder.events import read_events
from trainer.run_folder.folder import RunFolder

MakeConfig = Callable[..., Path]


def _contents(folder: Path) -> dict[Path, bytes]:
    left_out = {"lease.json", ".lease.lock"}
    return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file() and p.name not in left_out}


@pytest.fixture(scope="module")
def trained_run(tmp_path_factory: pytest.TempPathFactory, shared_corpus: tuple[Path, Path]) -> Path:
    """The configuration file of a run that has done 2 steps."""
    corpus, cache = shared_corpus
    root = tmp_path_factory.mktemp("trained")
    values = tiny_values(root / "runs", cache, corpus) | {"steps": 2}
    config = write_config(root / "tiny.yaml", values)
    trained(shardline("run", config, "--nproc-per-node", 2))
    return config


def test_no_such_file() -> None:
    refused(shardline("run", "nowhere.yaml"), "nowhere.yaml", "No such file")


def test_text_that_is_not_yaml(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("steps: [1, 2\nname: x\n")
    refused(shardline("run", tmp_path / "x.yaml"), "x.yaml line", "not valid YAML")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["optimizer.learning_rate=1"], ["unknown key optimizer.learning_rate"]),
        (["batch.globl_size=8"], ["unknown key batch.globl_size", "did you mean batch.global_size?"]),
        (["steps=many"], ["steps='many'", "valid integer"]),
        (["batch.global_size=10"], ["batch.global_size=10", "batch.micro_size=3 x 2 ranks = 6", "6 or 12"]),
        (
            ["precision.compute=fp8", "parallel.backend=deepspeed"],
            ["precision.compute=fp8 is there under parallel.backend=torch or bucketed only"],
        ),
        (
            ["parallel.backend=deepspeed", "parallel.strategy=ddp"],
            ["parallel.backend=deepspeed cannot do", "zero1, zero2"],
        ),
        (["parallel.backend=accelerate", "parallel.strategy=zero3"], ["on GPUs alone", "parallel.strategy=ddp"]),
        (["parallel.tensor=2"], ["parallel.tensor=2 is not there yet"]),
        (["parallel.strategy=none"], ["parallel.strategy=none", "there are 2"]),
        (["parallel.strategy=hsdp", "parallel.replicate=2"], ["parallel.replicate=2 does not fit 2 ranks", "4 ranks"]),
        (["data.paths=[/nowhere/at/all]"], ["data.paths: /nowhere/at/all names no file"]),
        (["model.architecture=lama"], ["model.architecture=lama", "did you mean"]),
        (["model.config.hiden_size=8"], ["model.config.hiden_size", "did you mean hidden_size?"]),
        (["model.config.vocab_size=100"], ["vocab_size=100 is smaller than the tokenizer's 301 tokens"]),
        (["data.sequence_length=4096"], ["data.sequence_length=4096", "64 positions"]),
        (["data.tokenizer=/nowhere/tokenizer"], ["data.tokenizer=/nowhere/tokenizer cannot be loaded"]),
        (["model.attention=flash_attention_2"], ["flash_attention_2"]),
        (["task.name=nowhere:Task"], ["task.name=nowhere:Task cannot be imported"]),
        (["checkpoint.from=/nowhere/run"], ["checkpoint.from=/nowhere/run", "no checkpoint"]),
    ],
    ids=lambda value: value[0].partition("=")[0] + "=" + value[0].partition("=")[2][:12] if "=" in value[0] else "",
)
def test_settings(make_config: MakeConfig, overrides: list[str], words: list[str]) -> None:
    config = make_config()
    refused(shardline("run", config, *overrides, "--nproc-per-node", 2), *words)
    # Nothing has been trained, so the mended configuration may start over in the same folder.
    check_continuation(RunFolder(config.parent / "runs" / "tiny"), load_config(config, ["seed=99"]))


@pytest.mark.parametrize(
    ("overrides", "word"),
    [
        (["batch.global_size=10"], "batch.global_size=10"),
        (["data.paths=[/nowhere/at/all]"], "data.paths"),
        (["model.architecture=lama"], "model.architecture=lama"),
    ],
    ids=["launcher", "preparation", "ranks"],
)
def test_new_interpreters_say_the_same(make_config: MakeConfig, overrides: list[str], word: str) -> None:
    """The others are copies of one, see tests.zygote; these are found by the launcher, its child, and the ranks."""
    refused(shardline("run", make_config(), *overrides, "--nproc-per-node", 2, is_real=True), word)


def test_an_unknown_launcher(make_config: MakeConfig) -> None:
    refused(shardline("run", make_config(), "--launcher", "mpirun"), "--launcher mpirun is not known; choose one of")


@pytest.mark.parametrize("package", ["deepspeed", "accelerate"])
def test_a_launcher_whose_package_is_missing(make_config: MakeConfig, package: str) -> None:
    program = f"import sys; sys.modules[{package!r}] = None; from launcher.cli import main; main()"
    finished = subprocess.run(
        [sys.executable, "-c", program, "run", make_config(), f"--launcher={package}"],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
        env=command_environment(),
        check=False,
    )
    refused(finished, f"--launcher {package} needs the package {package}, which is not installed", "pip install")


def test_an_empty_corpus(make_config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    config = make_config(data={"paths": [str(tmp_path / "empty.txt")]})
    refused(shardline("run", config), "the corpus is empty")


def test_a_corpus_shorter_than_a_sequence(make_config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("short\n")
    config = make_config(data={"paths": [str(tmp_path / "short.txt")], "sequence_length": 48})
    refused(shardline("run", config), "data.sequence_length=48")


def test_a_truncated_shard(make_config: MakeConfig, tmp_path: Path, values: dict[str, Any]) -> None:
    config = make_config(data={"cache_dir": str(tmp_path / "cache")})
    trained(shardline("data", "prepare", config))
    corpus = find_prepared(load_config(config).data)
    assert corpus is not None
    shard = corpus.folder / "train-00000.bin"
    size = shard.stat().st_size
    shard.write_bytes(shard.read_bytes()[:-10])
    refused(shardline("run", config), "train-00000.bin", str(size - 10), str(size), "delete the folder")


def test_a_port_in_use(make_config: MakeConfig) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        refused(shardline("run", make_config(launch={"master_port": port})), f"launch.master_port={port}")


def test_a_run_folder_of_another_configuration(trained_run: Path) -> None:
    before = _contents(trained_run.parent / "runs")
    sentence = refused(
        shardline("run", trained_run, "optimizer.lr=0.5", "seed=8", "steps=4", "--nproc-per-node", 2),
        "optimizer.lr",
        "seed",
        "0.5",
    )
    assert "steps" not in re.findall(r"(\w+):", sentence)
    assert _contents(trained_run.parent / "runs") == before


def test_fewer_steps_than_were_done(trained_run: Path) -> None:
    before = _contents(trained_run.parent / "runs")
    refused(shardline("run", trained_run, "steps=1", "--nproc-per-node", 2), "steps=1", "2 steps")
    assert _contents(trained_run.parent / "runs") == before


def test_a_folder_that_must_not_be_continued(trained_run: Path) -> None:
    arguments = ("steps=4", "checkpoint.resume=never", "--nproc-per-node", 2)
    refused(shardline("run", trained_run, *arguments), "checkpoint.resume=never", "step 2")


def test_a_checkpoint_of_another_model(trained_run: Path, make_config: MakeConfig) -> None:
    source = trained_run.parent / "runs" / "tiny"
    config = make_config("other", checkpoint={"from": str(source)})
    refused(
        shardline("run", config, "model.config.intermediate_size=54", "--nproc-per-node", 2),
        "another model",
        "[53, 30]",
    )
    refused(shardline("run", config, "optimizer.name=sgd", "--nproc-per-node", 2), "another model or optimizer")


def test_a_corrupt_checkpoint(trained_run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "runs" / "tiny"
    shutil.copytree(trained_run.parent / "runs" / "tiny", copy)
    shutil.copy(trained_run, tmp_path)
    arguments = ("run", tmp_path / "tiny.yaml", "steps=4", f"output_dir={tmp_path / 'runs'}", "--nproc-per-node", 2)
    file = copy / "checkpoints" / "step-00000002" / "rank-00001.safetensors"
    contents = file.read_bytes()
    file.write_bytes(contents[:-100])
    refused(shardline(*arguments), "rank-00001.safetensors", str(len(contents) - 100), "begin at step 0")
    # The ranks moved it away, and nobody begins at step 0 in its place.
    moved = copy / "checkpoints" / "damaged" / "step-00000002"
    assert not file.exists()
    assert [event["kind"] for event in read_events(copy)] == ["checkpoint_damaged"]
    refused(shardline(*arguments), "only corrupt ones", str(len(contents) - 100))
    assert len(read_metrics(copy)) == 2
    moved.rename(file.parent)
    file.write_bytes(contents)
    trained(shardline(*arguments))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def _fill(folder: Path, leave_bytes: int) -> Path:
    ballast = folder / "ballast"
    # A run that writes meanwhile makes it full before this is done, which is as good.
    with suppress(OSError), ballast.open("wb") as file:
        file.write(b"x" * (shutil.disk_usage(folder).free - leave_bytes))
    return ballast


def test_no_space_before_the_start(make_config: MakeConfig, small_disk: Path) -> None:
    _fill(small_disk, 4 << 20)
    refused(shardline("run", make_config(), f"output_dir={small_disk}"), str(small_disk), "bytes free")


@pytest.mark.slow
def test_no_space_in_mid_run(make_config: MakeConfig, small_disk: Path, tmp_path: Path) -> None:
    config = make_config("full", steps=300, checkpoint={"every_steps": 5}, schedule={"total_steps": 300})
    launcher = start_shardline("run", config, f"output_dir={small_disk}", "--nproc-per-node", 2, log=tmp_path / "log")
    run_dir = small_disk / "full"
    wait_until(lambda: RunFolder(run_dir).newest_checkpoint(), what="a checkpoint")
    ballast = _fill(small_disk, 100_000)
    assert launcher.wait(60) == 2
    last_line = (tmp_path / "log").read_text().strip().splitlines()[-1]
    assert last_line.startswith("error: the checkpoint of step ")
    assert "free some space" in last_line
    newest = RunFolder(run_dir).newest_checkpoint()
    assert newest is not None
    assert newest[0] % 5 == 0
    ballast.unlink()
    trained(shardline("run", config, f"output_dir={small_disk}", f"steps={newest[0] + 2}", "--nproc-per-node", 2))
    assert [line["step"] for line in read_metrics(run_dir)] == list(range(1, newest[0] + 3))
