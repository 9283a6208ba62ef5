"""`shardline slurm submit --dry-run`, and how many ranks an allocation makes."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.command import Place, deepspeed_command, torchrun_command
from launcher.plan import make_plan
from launcher.slurm.allocation import Allocation, ranks_of, read_allocation
from launcher.slurm.freeze import freeze, new_submission
from launcher.slurm.queue import call
from launcher.slurm.status import show_logs
from sharding.ranks.errors import RunFailure, UserError
from tests.support import ROOT, shardline
from trainer.config import RunConfig, load_config
from trainer.run_folder.provenance import FROZEN_REVISION_NAME

GOLDEN = Path(__file__).with_name("slurm_golden")
SCRIPTS = sorted([*(ROOT / "slurm").rglob("*.sh"), *(ROOT / "slurm").rglob("*.sbatch")])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("1-node.txt", ["--nodes", 1, "--gpus-per-node", 4]),
        (
            "8-nodes.txt",
            [
                *(
                    "--nodes",
                    8,
                    "--launcher",
                    "srun",
                    "--cpus-per-rank",
                    12,
                    "--time",
                    "24:00:00",
                ),
                *(
                    "--partition",
                    "gpu",
                    "--account",
                    "lm",
                    "--qos",
                    "long",
                    "--constraint",
                    "h100",
                    "--exclude",
                    "n[3,7]",
                ),
                *("--dependency", "afterany:41", "--array", "0-3", "name=sweep-{task}", "seed={task}"),
                *("--", "--exclusive", "--mail-user", "me@example.org", "--gpus-per-node=h100:8"),
            ],
        ),
    ],
)
def test_the_command_is_shown(config_file: Path, tmp_path: Path, name: str, options: list[object]) -> None:
    # Also where there is a Slurm to ask.
    (tmp_path / "sinfo").write_text("#!/bin/bash\necho sinfo: error: no controller >&2; exit 1\n")
    (tmp_path / "sinfo").chmod(0o755)
    shown = shardline(
        "slurm", "submit", config_file, "batch.global_size=192", "--dry-run", *options,
        PYTHONPATH=str(ROOT), PATH=f"{tmp_path}:{os.environ['PATH']}",
    )  # fmt: skip
    assert shown.returncode == 0, shown.stderr
    text = shown.stdout.replace(str(tmp_path), "TMP").replace(sys.executable, "PYTHON").replace(str(ROOT), "ROOT")
    assert text == (GOLDEN / name).read_text()
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["--nodes", 2, "--gpus-per-node", 4],
            "batch.global_size=12 is not divisible by batch.micro_size=3 x 8 ranks = 24",
        ),
        (
            ["--array", "0-3"],
            "every task of --array 0-3 would train the same run; put {task} into its name, name=tiny-",
        ),
        (["name=x-{task}"], "name=x-{task} has a meaning with --array only"),
        (["--gpus-per-node", 2, "--ntasks-per-node", 4], "--ntasks-per-node 4 does not fit --gpus-per-node 2"),
        (["launch.nproc_per_node=3"], "launch.nproc_per_node=3 does not fit the 1 ranks that you ask for"),
        (["--launcher", "mpirun"], "--launcher mpirun is not known; choose one of torchrun, deepspeed, srun"),
    ],
)
def test_mistakes_are_told_before_anything_is_submitted(
    config_file: Path, tmp_path: Path, arguments: list[object], sentence: str
) -> None:
    refused = shardline("slurm", "submit", config_file, *arguments)
    assert refused.returncode == 2
    assert refused.stderr.startswith(f"error: {sentence}")
    assert not (tmp_path / "runs").exists()


def test_a_job_has_its_own_code_and_configuration(config_file: Path) -> None:
    config = load_config(config_file)
    folder = new_submission(config.run_dir)
    freeze(folder, config)
    assert load_config(folder / "config.yaml") == config
    for name in ("trainer/rank.py", "slurm/pretrain.sbatch", "slurm/job.sh", "launcher/accelerate_defaults.yaml"):
        assert (folder / "code" / name).read_bytes() == (ROOT / name).read_bytes()
    printed = subprocess.run(
        [
            sys.executable,
            "-c",
            "import trainer.run_folder.provenance as p; print(p.__file__, sorted(p.code_revision()))",
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={"PYTHONPATH": str(folder / "code"), "PYTHONSAFEPATH": "1"},
        check=True,
    ).stdout
    assert printed.startswith(str(folder / "code" / "trainer"))
    assert "git_revision" in printed or "distribution_version" in printed
    assert (folder / "code" / FROZEN_REVISION_NAME).exists()
    assert new_submission(config.run_dir).name == "submission-2"


@pytest.mark.parametrize(
    ("gpus", "tasks", "one_task_per_rank", "expected"),
    [
        (4, 1, False, 4),
        (4, 4, False, 4),
        (4, 4, True, 4),
        (0, 2, False, 2),
        (0, 2, True, 2),
        (4, 1, True, "--ntasks-per-node=1 x 2 nodes = 2 tasks, but --gpus-per-node=4 x 2 nodes = 8 GPUs"),
        (4, 2, False, "--ntasks-per-node=2 x 2 nodes = 4 tasks, but --gpus-per-node=4 x 2 nodes = 8 GPUs"),
    ],
)
def test_ranks_of_an_allocation(
    config_file: Path, gpus: int, tasks: int, one_task_per_rank: bool, expected: int | str
) -> None:
    config: RunConfig = load_config(config_file)
    allocation = Allocation(job_id=1, num_nodes=2, gpus_per_node=gpus, tasks_per_node=tasks)
    if isinstance(expected, int):
        assert ranks_of(allocation, config, one_task_per_rank) == expected
        return
    with pytest.raises(UserError) as refused:
        ranks_of(allocation, config, one_task_per_rank)
    assert str(refused.value).startswith(expected)


def test_an_allocation_is_read_from_slurms_variables() -> None:
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "3", "SHARDLINE_TASKS_PER_NODE": "2(x3)", "SLURM_NNODES": "1"}
    assert read_allocation(job) == Allocation(7, 3, 0, 2)
    assert read_allocation(job | {"SLURM_GPUS_ON_NODE": "4"}).gpus_per_node == 4
    with pytest.raises(UserError, match=r"SLURM_TASKS_PER_NODE=2,1: nodes have different numbers"):
        read_allocation(job | {"SHARDLINE_TASKS_PER_NODE": "2,1"})
    with pytest.raises(UserError, match="SLURM_JOB_ID is not set; submit a script"):
        read_allocation({"SLURM_JOB_NUM_NODES": "1", "SHARDLINE_TASKS_PER_NODE": "1"})


def test_an_agent_knows_its_node() -> None:
    place = Place(num_nodes=2, node_rank=1, host="n1")
    torchrun = torchrun_command(["c.yaml"], 4000, ["0", "1"], place)
    assert {"--nnodes=2", "--node-rank=1", "--nproc-per-node=2", "--master-addr=n1", "--master-port=4000"} <= set(
        torchrun
    )
    assert {"--node_rank=1", "--master_addr=n1", "--master_port=4000"} <= set(
        deepspeed_command(["c.yaml"], 4000, ["0", "1"], place)
    )


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_scripts_pass_shellcheck(script: Path) -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    checked = subprocess.run(
        ["shellcheck", "-x", script], capture_output=True, text=True, cwd=ROOT / "slurm", check=False
    )
    assert checked.returncode == 0, checked.stdout


def test_a_run_of_one_machine_is_not_started_by_each_of_several_tasks(
    config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4"}
    refused = shardline("run", config_file, "--dry-run", **step)
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: srun started 4 tasks, each of which would start a run of its own")
    # The batch script's own variables, and those of a step of one task, are no obstacle.
    for name, value in {"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}.items():
        monkeypatch.setenv(name, value)
    assert make_plan(str(config_file), [], None, "torchrun").world.num_ranks == 2


def test_a_log_that_is_empty_is_called_so(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "logs" / "attempt-1" / "rank-3.log"
    log.parent.mkdir(parents=True)
    log.touch()
    show_logs(tmp_path, 3, follow=False)
    assert capfd.readouterr() == ("", f"{log} is empty so far\n")
    log.write_text("a warning\n")
    show_logs(tmp_path, 3, follow=False)
    assert capfd.readouterr() == ("a warning\n", "")
    with pytest.raises(UserError, match="has no log of rank 4 yet"):
        show_logs(tmp_path, 4, follow=False)


@pytest.mark.parametrize(
    ("program", "sentence"),
    [
        ("echo 'sbatch: error: invalid account' >&2; exit 1", "^sbatch: error: invalid account$"),
        ("exit 3", "^bash ended with status 3$"),
    ],
)
def test_a_refusal_is_told_in_slurms_own_words(program: str, sentence: str) -> None:
    with pytest.raises(RunFailure, match=sentence):
        call(["bash", "-c", program])
