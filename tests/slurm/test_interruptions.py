"""Jobs that Slurm interrupts: each goes on by itself and ends with the undisturbed run's parameters, bit for bit."""

import fcntl
import json
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.cluster import Cluster
from tests.support import ROOT, read_metrics, slow_from, training_curve, wait_until

MakeConfig = Callable[..., Path]
pytestmark = pytest.mark.timeout(500)

STEPS = 80
_LONG: dict[str, Any] = {
    "steps": STEPS,
    "schedule": {"name": "cosine", "total_steps": 400},
    "checkpoint": {"every_steps": 10},
}
TORCHRUN = ("pretrain.sbatch", "--nodes=2 --gpus-per-node=2")
SRUN = ("pretrain_srun.sbatch", "--nodes=2 --gpus-per-node=2 --ntasks-per-node=2")


# Until Slurm, which looks at time limits each half minute, gets round to it.
_SLOWLY = slow_from(15, 1)


@dataclass(frozen=True)
class Job:
    """A job and its run."""

    number: str
    run_dir: Path
    output: Path

    def step(self) -> int:
        lines = read_metrics(self.run_dir)
        return lines[-1]["step"] if lines else 0

    def attempts(self) -> int:
        return len(list((self.run_dir / "logs").glob("attempt-*")))


Submit = Callable[..., Job]


def _submit(
    cluster: Cluster,
    slurm_config: MakeConfig,
    folder: Path,
    name: str,
    kind: tuple[str, str],
    options: str = "",
    overrides: Sequence[str] = (),
    **extra: str,
) -> Job:
    config = slurm_config(name, **_LONG)
    script, counts = kind
    output = folder / f"{name}.out"
    number = cluster.submit(script, config, *overrides, output=output, options=f"{counts} {options}", **extra)
    return Job(number, config.parent / "runs" / name, output)


@pytest.fixture
def submit(cluster: Cluster, slurm_config: MakeConfig, tmp_path: Path) -> Submit:
    """Submit the run under a name and a script; options are added to its own."""
    return partial(_submit, cluster, slurm_config, tmp_path)


def _wait_for_step(job: Job, step: int) -> None:
    wait_until(lambda: job.step() >= step, timeout_s=200, what=f"step {step} of {job.run_dir.name}")


def _parameters(run_dir: Path) -> dict[str, bytes]:
    files = sorted((run_dir / "checkpoints" / f"step-{STEPS:08d}").glob("*.safetensors"))
    assert files
    return {file.name: file.read_bytes() for file in files}


def _equal(cluster: Cluster, job: Job, undisturbed: Job, attempts: int, restarts: int | None = None) -> None:
    facts = cluster.wait(job.number)
    assert (facts["JobState"], facts["ExitCode"]) == ("COMPLETED", "0:0"), job.output.read_text()
    assert int(facts["Restarts"]) == (attempts - 1 if restarts is None else restarts)
    assert job.attempts() == attempts
    cluster.wait(undisturbed.number)
    assert [row[:5] for row in training_curve(job.run_dir)] == [row[:5] for row in training_curve(undisturbed.run_dir)]
    assert _parameters(job.run_dir) == _parameters(undisturbed.run_dir)


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, slurm_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """The run that nobody interrupts; it may still be on its way."""
    return _submit(cluster, slurm_config, tmp_path_factory.mktemp("undisturbed"), "undisturbed", TORCHRUN)


def test_a_requeued_job_and_one_whose_ranks_are_warned_go_on(
    cluster: Cluster, submit: Submit, undisturbed: Job
) -> None:
    requeued = submit("requeued", TORCHRUN, **slow_from(20, 2))
    warned = submit("warned", SRUN)
    _wait_for_step(requeued, 12)
    cluster.run("scontrol", "requeue", requeued.number)
    _wait_for_step(warned, 12)
    # As --signal=USR1 does it: to the tasks alone. Ranks save by themselves, and the script requeues the job.
    cluster.run("scancel", "--signal=USR1", warned.number)
    # A job that goes on hears a warning as one that begins does; here the batch script alone.
    wait_until(lambda: requeued.attempts() == 2 and requeued.step() >= 20, timeout_s=200, what="the second attempt")
    cluster.run("scancel", "--batch", "--signal=USR1", requeued.number)
    _equal(cluster, requeued, undisturbed, attempts=3)
    assert "stopped by signal SIGUSR1 to the batch script" in requeued.output.read_text()
    _equal(cluster, warned, undisturbed, attempts=2)
    assert "stopped by signal SIGUSR1; run again to continue" in warned.output.read_text()


@pytest.mark.slow
def test_a_person_who_stops_or_cancels_a_job_is_obeyed(cluster: Cluster, submit: Submit) -> None:
    stopped = submit("stopped", TORCHRUN)
    cancelled = submit("cancelled", TORCHRUN, **slow_from(5, 1))
    _wait_for_step(stopped, 3)
    with (stopped.run_dir / ".lease.lock").open() as lock:
        # Rank 0 cannot give the folder back: its last work takes longer than Slurm gives a step that it ends.
        fcntl.flock(lock, fcntl.LOCK_EX)
        (stopped.run_dir / "stop").touch()
        wait_until((stopped.run_dir / "outcome.json").exists, what="the outcome")
        time.sleep(20)
    _wait_for_step(cancelled, 3)
    cluster.run("scancel", cancelled.number)
    facts = cluster.wait(stopped.number)
    assert (facts["JobState"], facts["ExitCode"], facts["Restarts"]) == ("FAILED", "75:0", "0")
    assert "stopped on request; run again to continue" in stopped.output.read_text()
    assert "CANCELLED" not in stopped.output.read_text()
    assert not (stopped.run_dir / "lease.json").exists()
    facts = cluster.wait(cancelled.number)
    assert (facts["JobState"], facts["Restarts"]) == ("CANCELLED", "0")
    # It had the time to save, and is not started again.
    wait_until(lambda: (cancelled.run_dir / "outcome.json").exists(), what="the outcome of the cancelled run")
    assert list((cancelled.run_dir / "checkpoints").glob("step-*/manifest.json"))
    assert "requeued" not in cancelled.output.read_text()


@pytest.mark.slow
def test_the_warning_before_the_time_limit_reaches_script_or_tasks(
    cluster: Cluster, submit: Submit, undisturbed: Job
) -> None:
    jobs = [
        submit("limit-script", TORCHRUN, "--time=20 --signal=B:USR2@70", **_SLOWLY),
        submit("limit-tasks", TORCHRUN, "--time=20 --signal=USR1@70", **_SLOWLY),
        # Slurm looks at time limits each half minute: often too late for this warning, so that it ends the run.
        submit("limit-passed", TORCHRUN, "--time=20 --signal=USR1@1", **_SLOWLY),
    ]
    for job, minutes in zip(jobs, (2, 2, 1), strict=True):
        _wait_for_step(job, 12)
        cluster.run("scontrol", "update", f"JobId={job.number}", f"TimeLimit={minutes}")
    for job in reversed(jobs):
        wait_until(lambda job=job: cluster.facts(job.number)["Restarts"] == "1", timeout_s=150, what="the requeue")
        # It may have ended by now.
        cluster.run("scontrol", "update", f"JobId={job.number}", "TimeLimit=20", check=False)
    for job in jobs:
        _equal(cluster, job, undisturbed, attempts=2)
    assert "SIGUSR2 to the batch script; the run saves and stops" in jobs[0].output.read_text()
    assert "stopped by signal SIGUSR1 to" in jobs[1].output.read_text()
    last = jobs[2].output.read_text()
    assert "DUE TO TIME LIMIT" in last or "stopped by signal SIGUSR1 to" in last


@pytest.mark.slow
@pytest.mark.timeout(1100)
def test_a_job_whose_time_limit_strikes_three_times_ends_as_the_undisturbed_run(
    cluster: Cluster, submit: Submit, undisturbed: Job
) -> None:
    cluster.wait(undisturbed.number)
    # Each attempt is warned 110 to 140 s after its start: a busy machine takes its first step by then, and an idle one
    # takes fewer than a third of them all.
    slowly = slow_from(5, 1, 2, 3, seconds=5.0)
    job = submit("limit-thrice", TORCHRUN, "--time=4 --signal=B:USR1@100", **slowly)
    wait_until(lambda: cluster.facts(job.number)["Restarts"] == "3", timeout_s=700, what="the third requeue")
    cluster.run("scontrol", "update", f"JobId={job.number}", "TimeLimit=20", check=False)
    _equal(cluster, job, undisturbed, attempts=4)
    assert job.output.read_text().count("SIGUSR1 to the batch script; the run saves and stops") == 3


@pytest.mark.slow
def test_jobs_of_a_lower_partition_give_way_and_go_on(cluster: Cluster, submit: Submit, undisturbed: Job) -> None:
    cluster.wait(undisturbed.number)
    jobs = [submit("preempted-torchrun", TORCHRUN, **_SLOWLY), submit("preempted-srun", SRUN, **_SLOWLY)]
    for job in jobs:
        _wait_for_step(job, 12)
    higher = cluster.run(
        "sbatch", "--parsable", "--partition=high", "--nodes=2", "--gpus-per-node=16", "--output=/dev/null",
        "--wrap", "sleep 1",
    ).strip()  # fmt: skip
    assert cluster.wait(higher)["JobState"] == "COMPLETED"
    for job in jobs:
        _equal(cluster, job, undisturbed, attempts=2)


@pytest.mark.slow
def test_a_job_whose_node_dies_goes_on_when_it_is_back(cluster: Cluster, submit: Submit, undisturbed: Job) -> None:
    cluster.wait(undisturbed.number)
    job = submit("bereft", TORCHRUN, **_SLOWLY)
    _wait_for_step(job, 12)
    # The node of rank 0, which holds the run's lease.
    cluster.kill_node("n1")
    wait_until(lambda: cluster.facts(job.number)["Restarts"] == "1", timeout_s=60, what="the requeue")
    cluster.return_node("n1")
    _equal(cluster, job, undisturbed, attempts=2)


@pytest.mark.slow
def test_ranks_start_again_within_a_job_whose_rank_was_killed(
    cluster: Cluster, submit: Submit, undisturbed: Job
) -> None:
    kill = {"SHARDLINE_INJECT": json.dumps([{"fault": "kill", "rank": 3, "step": 12, "attempt": 1}])}
    job = submit("restarted", TORCHRUN, overrides=["faults.max_restarts=2"], **kill)
    _wait_for_step(job, 3)
    # Whatever becomes of the user's file, a job trains what it began with.
    file = job.run_dir.parent.parent / "restarted.yaml"
    file.write_text(file.read_text().replace("lr: 0.01", "lr: 0.5"))
    _equal(cluster, job, undisturbed, attempts=2, restarts=0)
    assert "restart 1 of 2 in 1 s" in job.output.read_text()
    failure = json.loads((job.run_dir / "logs" / "attempt-1" / "failure.json").read_text())
    assert (failure["kind"], failure["rank"]) == ("killed", 3)


@pytest.mark.slow
def test_a_node_whose_own_check_fails_is_left_out(cluster: Cluster, slurm_config: MakeConfig, tmp_path: Path) -> None:
    # Slurm gives a job of one node the first that is free, whose driver is broken. Scripts lie where names have spaces.
    driver = tmp_path / "driver"
    driver.mkdir()
    (driver / "nvidia-smi").write_text("#!/bin/sh\necho Unable to determine the device handle; exit 15\n")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/bash\n[[ $SLURMD_NODENAME != n1 ]] || PATH={driver}:$PATH\nexec {sys.executable} "$@"\n')
    for program in (driver / "nvidia-smi", python):
        program.chmod(0o755)
    scripts = tmp_path / "my own scripts"
    scripts.mkdir()
    for name in ("pretrain.sbatch", "job.sh"):
        shutil.copy(ROOT / "slurm" / name, scripts)
    config = slurm_config("left-out", launch={"threads_per_rank": 1, "preflight": True})
    output = tmp_path / "job.out"
    number = cluster.submit(
        "pretrain.sbatch",
        config,
        output=output,
        options="--nodes=1 --gpus-per-node=1",
        scripts=scripts,
        SHARDLINE_PYTHON=str(python),
    )
    facts = cluster.wait(number)
    printed = output.read_text()
    assert (facts["JobState"], facts["Restarts"], facts["ExcNodeList"]) == ("COMPLETED", "1", "n1"), printed
    assert "devices: n1: nvidia-smi says Unable to determine the device handle" in printed
    assert f"job {number}: starting again without n1, whose own check failed" in printed
    run_dir = config.parent / "runs" / "left-out"
    assert (run_dir / "bad_nodes").read_text().startswith(f"{number} 0 n1 devices: ")
    assert len(read_metrics(run_dir)) == 6


@pytest.mark.slow
def test_a_task_of_an_array_is_requeued_alone(
    cluster: Cluster, slurm_config: MakeConfig, tmp_path: Path, undisturbed: Job
) -> None:
    config = slurm_config("array", **_LONG)
    script, counts = SRUN
    array = cluster.submit(
        script, config, "name=array-{task}", output=tmp_path / "task-%a.out", options=f"{counts} --array=1-2"
    )
    tasks = [
        Job(f"{array}_{task}", config.parent / "runs" / f"array-{task}", tmp_path / f"task-{task}.out")
        for task in (1, 2)
    ]
    # The last task's job has the array's own number.
    _wait_for_step(tasks[1], 12)
    cluster.run("scancel", "--signal=USR1", tasks[1].number)
    _equal(cluster, tasks[0], undisturbed, attempts=1)
    _equal(cluster, tasks[1], undisturbed, attempts=2)
