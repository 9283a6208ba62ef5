"""Jobs that Slurm interrupts: each goes on by itself and ends with the undisturbed run's parameters, bit for bit."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.support import read_metrics, training_curve, wait_until

MakeConfig = Callable[..., Path]
pytestmark = pytest.mark.timeout(500)

STEPS = 80
TORCHRUN = ("pretrain.sbatch", "--nodes=2 --gpus-per-node=2")
SRUN = ("pretrain_srun.sbatch", "--nodes=2 --gpus-per-node=2 --ntasks-per-node=2")


@dataclass(frozen=True)
class Job:
    """A job and its run."""

    number: str
    run_dir: Path
    output: Path

    def step(self) -> int:
        lines = read_metrics(self.run_dir)
        return lines[-1]["step"] if lines else 0


Submit = Callable[..., Job]


@pytest.fixture
def submit(cluster: Cluster, slurm_config: MakeConfig, tmp_path: Path) -> Submit:
    """Submit the run under a script; options are added to it."""

    def start(name: str, kind: tuple[str, str], options: str = "", steps: int = STEPS) -> Job:
        config = slurm_config(
            name, steps=steps, schedule={"name": "cosine", "total_steps": 400}, checkpoint={"every_steps": 10}
        )
        script, counts = kind
        output = tmp_path / f"{name}.out"
        number = cluster.submit(script, config, output=output, options=f"{counts} {options}")
        return Job(number, config.parent / "runs" / name, output)

    return start


def _wait_for_step(job: Job, step: int) -> None:
    wait_until(lambda: job.step() >= step, timeout_s=200, what=f"step {step} of {job.run_dir.name}")


def _parameters(run_dir: Path) -> dict[str, bytes]:
    files = sorted((run_dir / "checkpoints" / f"step-{STEPS:08d}").glob("*.safetensors"))
    assert files
    return {file.name: file.read_bytes() for file in files}


def _equal(cluster: Cluster, job: Job, undisturbed: Job, attempts: int) -> None:
    facts = cluster.wait(job.number)
    assert (facts["JobState"], facts["ExitCode"]) == ("COMPLETED", "0:0"), job.output.read_text()
    assert int(facts["Restarts"]) == attempts - 1
    assert len(list((job.run_dir / "logs").glob("attempt-*"))) == attempts
    cluster.wait(undisturbed.number)
    assert [row[:5] for row in training_curve(job.run_dir)] == [row[:5] for row in training_curve(undisturbed.run_dir)]
    assert _parameters(job.run_dir) == _parameters(undisturbed.run_dir)


def test_a_requeued_job_and_one_that_is_warned_of_its_end_go_on(cluster: Cluster, submit: Submit) -> None:
    undisturbed = submit("undisturbed", SRUN)
    requeued = submit("requeued", TORCHRUN)
    warned = submit("warned", SRUN)
    _wait_for_step(requeued, 12)
    cluster.run("scontrol", "requeue", requeued.number)
    _wait_for_step(warned, 12)
    # As --signal does it, here to the tasks: ranks save by themselves, and the script requeues the job.
    cluster.run("scancel", "--signal=USR1", warned.number)
    _equal(cluster, requeued, undisturbed, attempts=2)
    _equal(cluster, warned, undisturbed, attempts=2)
    assert "stopped by signal SIGUSR1; run again to continue" in warned.output.read_text()
