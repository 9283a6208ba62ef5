"""What a person asks Slurm for, held against what the nodes have; and what a job takes along of the user's own."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from launcher.commands import app
from launcher.slurm import status
from launcher.slurm import submit as submission
from launcher.slurm.freeze import freeze, new_submission
from launcher.slurm.partition import Nodes, fitted, partition_nodes
from launcher.slurm.queue import QueuedJob
from launcher.slurm.reasons import meaning_of
from launcher.slurm.request import Request, split_arguments, with_further
from launcher.slurm.status import show_status
from launcher.slurm.submit import resubmit
from sharding.ranks.errors import UserError
from tests.support import write_config
from trainer.config import load_config

_NO_SCRIPT = Path("no-script")
_SMALL = Nodes("main", True, 2, 8, {"": 4})
_LARGE = Nodes("main", True, 1, 64, {"h100": 8})
_HOST = Nodes("cpu", False, 3, 16, {})


def _request(
    nodes: int = 1,
    gpus: str | None = None,
    ntasks: int | None = None,
    cpus: int | None = None,
    further: Sequence[str] = (),
    **options: str,
) -> Request:
    return with_further(Request(nodes, gpus, ntasks, cpus, "torchrun", dict(options)), further)


@pytest.mark.parametrize(
    ("request_", "nodes", "cpus_per_rank"),
    [
        (_request(2, "2"), [_SMALL], 2),
        (_request(1, "8"), [_SMALL, _LARGE], 8),
        (_request(1, "4"), [_SMALL, _LARGE], 2),
        (_request(1, "h100:8"), [_SMALL, _LARGE], 8),
        (_request(1, None, 4), [_HOST], 4),
        (_request(1, None, 1), [_SMALL, _HOST], 8),
        (_request(1, "0"), [_SMALL], 8),
        (_request(2, "2", cpus=4), [_SMALL], 4),
        # Nobody to ask.
        (_request(2, "2"), [], 8),
    ],
)
def test_ranks_get_the_cpus_that_nodes_have_for_each(
    request_: Request, nodes: Sequence[Nodes], cpus_per_rank: int
) -> None:
    assert fitted(request_, nodes).cpus_per_rank == cpus_per_rank


@pytest.mark.parametrize(
    ("request_", "sentence"),
    [
        (
            _request(2, "2", cpus=8),
            "2 ranks x 8 CPUs = 16 CPUs on each node, but the nodes of partition main have at most 8; set "
            "--cpus-per-rank to at most 4.",
        ),
        (
            _request(1, None, 9),
            "9 ranks x 1 CPUs = 9 CPUs on each node, but the nodes of partition main have at most 8; ask for fewer "
            "ranks a node.",
        ),
        (
            _request(1, "8"),
            "--gpus-per-node 8: the nodes of partition main have at most 4 each; ask for fewer a node and for more "
            "nodes.",
        ),
        (
            _request(1, "a100:1"),
            "--gpus-per-node a100:1: the nodes of partition main have at most 0 of a100 each; ask for fewer a node, or "
            "for another partition.",
        ),
        (_request(3, "1"), "--nodes 3: partition main has 2 nodes that can hold 1 ranks; ask for fewer nodes."),
        (
            _request(1),
            "--gpus-per-node is not given, but the nodes of partition main have 4 GPUs each, and the job would train "
            "on CPUs; add --gpus-per-node 4, or --gpus-per-node 0 where that is meant.",
        ),
    ],
)
def test_what_no_node_can_hold_is_refused_with_the_arithmetic(request_: Request, sentence: str) -> None:
    with pytest.raises(UserError) as refused:
        fitted(request_, [_SMALL])
    assert str(refused.value) == sentence


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Put a program in the place of one of Slurm's."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    for name in ("SBATCH_PARTITION", "PYTHONPATH"):
        monkeypatch.delenv(name, raising=False)

    def put(name: str, text: str) -> None:
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)

    return put


_SINFO = """cat << END
gpu*|2|8|gpu:a100:4(S:0-1)
gpu*|1|96+|gpu:h100:6,gpu:a100:2,nvme:1
cpu|3|16|(null)
END"""


def test_partitions_are_those_that_sbatch_would_take(
    tmp_path: Path, stand_in: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in("sinfo", _SINFO)
    script = tmp_path / "own.sbatch"
    small, large = Nodes("gpu", True, 2, 8, {"a100": 4}), Nodes("gpu", True, 1, 96, {"h100": 6, "a100": 2})
    assert partition_nodes(_request(), script) == [small, large]
    assert [large.num_gpus(kind) for kind in ("", "h100", "a100", "v100")] == [8, 6, 2, 0]
    script.write_text("#!/bin/bash\n#SBATCH --partition=cpu\n")
    host = Nodes("cpu", False, 3, 16, {})
    assert partition_nodes(_request(), script) == [host]
    monkeypatch.setenv("SBATCH_PARTITION", "gpu")
    assert partition_nodes(_request(), script) == [small, large]
    assert partition_nodes(_request(partition="gpu,cpu"), script) == [small, large, host]
    assert partition_nodes(_request(partition="gpu", further=["--exclusive", "-p", "cpu"]), script) == [host]
    with pytest.raises(UserError, match=r"^there is no partition slow; there are: cpu, gpu.$"):
        partition_nodes(_request(further=["--partition=slow"]), script)


def test_options_of_sbatch_follow_two_dashes() -> None:
    settings, further = split_arguments(["steps=3", "seed=4", "--exclusive", "--mail-user", "a=b", "--gres=nvme:1"])
    assert (settings, further) == (["steps=3", "seed=4"], ["--exclusive", "--mail-user", "a=b", "--gres=nvme:1"])
    assert _request(further=further).further == tuple(further)
    given = _request(further=["--exclusive", "--gpus-per-node", "h100:4", "--comment=x"])
    assert (given.num_gpus, given.ranks_per_node, given.further) == (4, 4, ("--exclusive", "--comment=x"))


@pytest.mark.parametrize(
    ("gpus", "further", "sentence"),
    [
        ("all", [], "--gpus-per-node all is no number of GPUs; write 4, or h100:4 for a kind of them."),
        ("2", ["--gpus-per-node", "h100:4"], "--gpus-per-node 2 before -- and h100:4 after it: write it once."),
        (
            None,
            ["--exclusive", "--gres=gpu:4"],
            "--gres=gpu:4 after -- would contradict what submit asks for; use --gpus-per-node.",
        ),
        (None, ["-N2"], "-N2 after -- would contradict what submit asks for; use --nodes before --."),
        (
            None,
            ["--export=NONE"],
            "--export=NONE after -- would contradict what submit asks for; use export NAME=value before you submit: "
            "the job has your environment.",
        ),
    ],
)
def test_options_that_contradict_one_another_are_refused(
    gpus: str | None, further: Sequence[str], sentence: str
) -> None:
    with pytest.raises(UserError) as refused:
        _request(gpus=gpus, further=further)
    assert str(refused.value) == sentence


def test_a_gpu_configuration_is_not_sent_to_cpus(config_file: Path, stand_in: Callable[[str, str], None]) -> None:
    stand_in("sinfo", "echo 'cpu*|3|16|(null)'")
    overrides = ["precision.compute=bf16"]
    with pytest.raises(UserError, match=r"^precision.compute=bf16 is for GPUs, but --gpus-per-node is not given"):
        submission.submit(str(config_file), overrides, _request(), dry_run=True)
    submission.submit(str(config_file), overrides, _request(gpus="0"), dry_run=True)


def test_a_submission_takes_scripts_of_ones_own_and_can_be_submitted_again_from_anywhere(
    tmp_path: Path,
    config_file: Path,
    stand_in: Callable[[str, str], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stand_in("sinfo", _SINFO)
    stand_in("squeue", "")
    stand_in("sbatch", f'printf "%s\\n" "$PWD" "$PYTHONPATH" "$SHARDLINE_HOST_PYTHON" "$@" >> {tmp_path}/calls; echo 7')
    home = tmp_path / "a home, with a comma"
    (home / "slurm").mkdir(parents=True)
    (home / "slurm" / "pretrain.sbatch").write_text("#!/bin/bash\n#SBATCH --partition=cpu\nmodule load ours\n")
    (home / "slurm" / "job.sh").write_text("# of another version\n")
    monkeypatch.chdir(home)
    monkeypatch.setenv("PYTHONPATH", "/mine,and/yours")
    run_dir = home / "runs" / "tiny"
    request = _request(further=["--exclusive"], time="10")
    submission.submit(str(config_file), ["output_dir=runs", "data.cache_dir=nothing-prepared"], request, dry_run=False)
    printed = capsys.readouterr().out
    assert f"scripts of your own: {home}/slurm" in printed
    assert "the corpus is not prepared yet: the job's first node does it, while the others wait" in printed
    frozen = run_dir / "slurm" / "submission-1" / "code" / "slurm"
    assert "module load ours" in (frozen / "pretrain.sbatch").read_text()
    assert (frozen / "job.sh").read_text() == "# of another version\n"
    assert f"note: {home}/slurm/job.sh is not the one of this version" in printed
    first = (tmp_path / "calls").read_text().splitlines()
    assert first[1:3] == [f"{frozen.parent}:/mine,and/yours", sys.executable]
    assert {f"--chdir={home}", "--export=ALL", "--cpus-per-task=8", "--time=10", "--exclusive"} <= set(first)
    assert first[-2:] == [str(frozen / "pretrain.sbatch"), str(frozen.parent.parent / "config.yaml")]

    (tmp_path / "calls").unlink()
    monkeypatch.chdir("/")
    resubmit(Path(os.path.relpath(run_dir)))
    again = (tmp_path / "calls").read_text().splitlines()
    assert (again[0], again[1:]) == ("/", first[1:])
    assert (run_dir / "slurm" / "jobs").read_text().split() == ["7", "7"]


def test_the_module_of_a_task_of_ones_own_is_frozen_with_what_it_imports(
    tmp_path: Path, config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").mkdir()
    for name, text in {
        "my_task.py": "import json, yaml, my_helper\nfrom mine.deep import x\nclass Task: where = 'frozen'\n",
        "my_helper.py": "def f():\n    from my_other import y\n",
        "my_other.py": "y = 1\n",
        "mine/__init__.py": "",
        "mine/deep.py": "x = 1\n",
        "mine/table.json": "{}",
        "unrelated.py": "",
    }.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "mine" / "weights.bin").write_bytes(bytes(2**20 + 1))
    # Not the working folder: modules come from where the configuration is.
    monkeypatch.chdir("/")
    config = load_config(config_file, ["task.name=my_task:Task"])
    folder = new_submission(config.run_dir)
    freeze(folder, config)
    code = folder / "code"
    for name in ("my_task.py", "my_helper.py", "my_other.py", "mine/__init__.py", "mine/deep.py", "mine/table.json"):
        assert (code / name).read_bytes() == (tmp_path / name).read_bytes()
    left_out = ("unrelated.py", "yaml", "json", "json.py", "mine/weights.bin")
    assert [name for name in left_out if (code / name).exists()] == []

    (tmp_path / "my_task.py").write_text("class Task: where = 'edited'\n")
    # As the registry does it, without our own tasks, which would load torch.
    program = """
import sys
from trainer.config import load_config
from trainer.runtime.own_modules import import_own
task = load_config(sys.argv[1], []).task
print(import_own(task.name, "task.name", task.folder).where)
"""
    printed = subprocess.run(
        [sys.executable, "-c", program, folder / "config.yaml"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": f"{code}", "PYTHONSAFEPATH": "1"},
        check=False,
    )
    assert printed.stdout == "frozen\n", printed.stderr
    with pytest.raises(UserError, match=r"^task.name=nowhere:...: there is no module nowhere on "):
        freeze(new_submission(config.run_dir), load_config(config_file, ["task.name=nowhere:Task"]))


def test_a_submission_takes_models_and_samples_of_ones_own_along(tmp_path: Path) -> None:
    (tmp_path / "my_model.py").write_text("def make(*, facts, num_outputs): ...\n")
    (tmp_path / "my_samples.py").write_text("import my_model\n")
    model, data = {"factory": "my_model:make"}, {"source": "factory", "factory": "my_samples:make"}
    values = {"name": "own", "steps": 1, "task": {"name": "classification"}, "model": model, "data": data}
    config = load_config(write_config(tmp_path / "own.yaml", values | {"output_dir": str(tmp_path / "runs")}))
    folder = new_submission(config.run_dir)
    freeze(folder, config)
    frozen = load_config(folder / "config.yaml")
    assert frozen.model.folder == frozen.data.folder == str(folder / "code")
    assert {"my_model.py", "my_samples.py"} <= {path.name for path in (folder / "code").iterdir()}


def test_a_waiting_jobs_reason_is_told_with_its_meaning(
    tmp_path: Path, stand_in: Callable[[str, str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in("squeue", "echo '7|PENDING||10:00|PartitionConfig'")
    (tmp_path / "runs" / "tiny" / "slurm").mkdir(parents=True)
    (tmp_path / "runs" / "tiny" / "slurm" / "jobs").write_text("7\n")
    show_status([tmp_path / "runs"], 0.0, as_json=False)
    header, row, empty, meaning = capsys.readouterr().out.splitlines()
    assert row.split()[:4] == ["tiny", "7", "PENDING", "(PartitionConfig)"]
    assert (header.split()[0], empty) == ("RUN", "")
    assert meaning == (
        "PartitionConfig: the partition has no such nodes, or not as many; it waits for ever: cancel it and submit it "
        "with fewer nodes, GPUs or CPUs"
    )
    show_status([tmp_path / "runs"], 0.0, as_json=True)
    (run,) = json.loads(capsys.readouterr().out)["runs"]
    assert (run["run"], run["job"], run["state"], run["reason"]) == ("tiny", "7", "PENDING", "PartitionConfig")
    with pytest.raises(UserError, match="--json is one document"):
        show_status([tmp_path / "runs"], 30.0, as_json=True)
    assert meaning_of("ReqNodeNotAvail, UnavailableNodes:n1") == "nodes that it asks for are down, drained or reserved"
    assert meaning_of("AssocGrpGRES").startswith("your account's share is in use")
    assert meaning_of("SomethingNew") == ""
    assert QueuedJob("PENDING", "", "", "").is_active


def test_watching_asks_slurm_every_half_minute(
    tmp_path: Path, stand_in: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in("squeue", f"echo asked >> {tmp_path}/calls")
    waited: list[float] = []

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(status.time, "sleep", sleep)
    with pytest.raises(SystemExit) as ended:
        app(["slurm", "status", "--watch", str(tmp_path)])
    assert ended.value.code == 0
    # All users share the controller that each look asks.
    assert waited == [30.0] * 3
    assert (tmp_path / "calls").read_text().split() == ["asked"] * 3
