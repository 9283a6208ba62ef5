"""`shardline slurm`: a person's way from submitting a run to continuing it."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.support import ROOT, read_metrics, slow_from, wait_until

MakeConfig = Callable[..., Path]
pytestmark = pytest.mark.timeout(500)


def _shardline(cluster: Cluster, *arguments: object, status: int = 0, folder: Path = ROOT) -> str:
    finished = subprocess.run(
        [cluster.enter, sys.executable, "-m", "launcher", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=100,
        cwd=folder,
        env=cluster.environment,
        check=False,
    )
    assert finished.returncode == status, finished.stdout + finished.stderr
    return finished.stdout + finished.stderr


def _cells(cluster: Cluster, folder: Path) -> dict[str, str]:
    """The only row of the table, by column."""
    header, row = _shardline(cluster, "slurm", "status", folder).splitlines()
    starts = [header.index(name) for name in ("RUN", "JOB", "STATE", "NODES", "STEP", "LOSS", "TOKENS/S")]
    ends = [*starts[1:], header.index("TIME LEFT")]
    return {header[a:b].strip(): row[a:b].strip() for a, b in zip(starts, ends, strict=True)}


def test_from_submit_to_the_last_step(
    cluster: Cluster, slurm_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So that it is there as long as it is looked at.
    monkeypatch.setattr(cluster, "environment", {**cluster.environment, **slow_from(8, 1)})
    config = slurm_config("submitted", steps=60, checkpoint={"every_steps": 10})
    run_dir = config.parent / "runs" / "submitted"
    few = _shardline(cluster, "slurm", "submit", config, "--nodes", 4, "--gpus-per-node", 1, status=2)
    assert "error: --nodes 4: partition main has 2 nodes that can hold 1 ranks" in few
    asked = ["--nodes", 2, "--gpus-per-node", 2, "--", "--comment=mine"]
    shown = _shardline(cluster, "slurm", "submit", config, *asked)
    job = (run_dir / "slurm" / "jobs").read_text().strip()
    assert shown.splitlines()[:2] == [
        f"submitted job {job}: {run_dir}",
        f"  what runs   {run_dir}/slurm/submission-1",
    ]
    # A queued job trains what was submitted: the file is another now.
    config.write_text("steps: nonsense\n")
    facts = cluster.facts(job)
    # Of 64 CPUs and 16 GPUs on each node.
    assert (facts["NumCPUs"], facts["Comment"]) == ("16", "mine")
    again = _shardline(cluster, "slurm", "resubmit", run_dir, status=2)
    assert f"error: {run_dir} has job {job} already" in again

    wait_until(lambda: len(read_metrics(run_dir)) >= 5, timeout_s=200, what="step 5")
    cells = _cells(cluster, run_dir.parent)
    assert (cells["RUN"], cells["JOB"], cells["STATE"], cells["NODES"]) == ("submitted", job, "RUNNING", "n[1-2]")
    step, _, total = cells["STEP"].partition("/")
    assert (int(step) >= 5, total) == (True, "60")
    assert float(cells["LOSS"]) > 0
    assert "zero2 on 4 x CPU" in _shardline(cluster, "slurm", "logs", run_dir)
    assert (run_dir / "logs" / "attempt-1" / "rank-3.log").exists()
    _shardline(cluster, "slurm", "logs", run_dir, "--rank", 3)

    assert "saves and stops at the next step's edge" in _shardline(cluster, "slurm", "cancel", run_dir)
    facts = cluster.wait(job)
    assert (facts["ExitCode"], facts["Restarts"]) == ("75:0", "0")
    assert _cells(cluster, run_dir)["STATE"] == "STOPPED"
    assert "no job of" in _shardline(cluster, "slurm", "cancel", run_dir, status=2)

    _shardline(cluster, "slurm", "resubmit", run_dir, folder=run_dir)
    second = (run_dir / "slurm" / "jobs").read_text().split()[-1]
    assert second != job
    assert cluster.wait(second)["ExitCode"] == "0:0"
    assert [line["step"] for line in read_metrics(run_dir)] == list(range(1, 61))
    assert _cells(cluster, run_dir)["STATE"] == "FINISHED"
    assert f"job {second}: finished at step 60" in _shardline(cluster, "slurm", "logs", run_dir)


@pytest.mark.slow
def test_where_requeue_is_forbidden_a_successor_is_submitted(
    cluster: Cluster, slurm_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = slurm_config("succeeded", steps=60, checkpoint={"every_steps": 20})
    run_dir = config.parent / "runs" / "succeeded"
    # What sbatch takes from the environment goes before what stands in the script.
    monkeypatch.setattr(cluster, "environment", {**cluster.environment, "SBATCH_NO_REQUEUE": "1"})
    _shardline(cluster, "slurm", "submit", config, "--nodes", 2, "--ntasks-per-node", 1)
    wait_until(lambda: len(read_metrics(run_dir)) >= 5, timeout_s=200, what="step 5")
    first = (run_dir / "slurm" / "jobs").read_text().strip()
    cluster.run("scancel", "--batch", "--signal=USR1", first)
    assert (cluster.wait(first)["ExitCode"], cluster.facts(first)["Restarts"]) == ("75:0", "0")
    assert (
        "this cluster forbids to requeue it; submitting another in its place"
        in (run_dir / "slurm" / f"job-{first}.out").read_text()
    )
    _, second = (run_dir / "slurm" / "jobs").read_text().split()
    assert cluster.wait(second)["ExitCode"] == "0:0"
    assert [line["step"] for line in read_metrics(run_dir)] == list(range(1, 61))


@pytest.mark.slow
def test_a_sweep_is_an_array_of_runs(cluster: Cluster, slurm_config: MakeConfig) -> None:
    config = slurm_config("sweep")
    runs = config.parent / "runs"
    _shardline(
        cluster, "slurm", "submit", config, "name=seed-{task}", "seed={task}", "--array", "3-4", "--ntasks-per-node", 2
    )
    array = (runs / "seed-array" / "slurm" / "jobs").read_text().strip()
    for task in (3, 4):
        assert cluster.wait(f"{array}_{task}")["ExitCode"] == "0:0"
        assert len(read_metrics(runs / f"seed-{task}")) == 6
        assert f"seed: {task}" in (runs / f"seed-{task}" / "config.yaml").read_text()
    shown = _shardline(cluster, "slurm", "status", runs / "seed-array").splitlines()
    assert [row.split()[:3] for row in shown[1:]] == [
        ["seed-3", f"{array}_3", "FINISHED"],
        ["seed-4", f"{array}_4", "FINISHED"],
    ]
