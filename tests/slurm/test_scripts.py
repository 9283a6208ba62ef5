"""The scripts as a person submits them: on two nodes with two ranks each, they train as one process does."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.support import read_metrics, run_module, trained

MakeConfig = Callable[..., Path]
pytestmark = pytest.mark.timeout(400)

SCRIPTS = {
    "pretrain.sbatch": "--gpus-per-node=2",
    "pretrain_deepspeed.sbatch": "--gpus-per-node=2",
    "pretrain_srun.sbatch": "--gpus-per-node=2 --ntasks-per-node=2",
}


def _losses(run_dir: Path) -> list[float]:
    return [line["train/loss"] for line in read_metrics(run_dir)]


def test_two_nodes_under_each_script_train_as_one_process_does(
    cluster: Cluster, slurm_config: MakeConfig, tmp_path: Path
) -> None:
    jobs = {}
    for script, options in SCRIPTS.items():
        name = script.partition(".")[0]
        output = tmp_path / f"{name}.out"
        job = cluster.submit(script, slurm_config(name), output=output, options=f"--nodes=2 {options}")
        jobs[name] = (job, output)
    alone = slurm_config("alone")
    trained(run_module("trainer", alone))
    expected = _losses(alone.parent / "runs" / "alone")
    assert len(expected) == 6
    for name, (job, output) in jobs.items():
        facts = cluster.wait(job)
        printed = output.read_text()
        assert (facts["JobState"], facts["ExitCode"]) == ("COMPLETED", "0:0"), printed
        assert f"job {job}: 2 nodes x 2 GPUs = 4 ranks" in printed
        assert "zero2 on 4 x CPU" in printed
        assert printed.splitlines()[-1] == f"job {job}: finished at step 6: all steps done"
        run_dir = alone.parent / "runs" / name
        assert _losses(run_dir) == pytest.approx(expected, rel=1e-6)
        assert sorted(path.name for path in (run_dir / "logs" / "attempt-1").glob("rank-?.log")) == [
            f"rank-{rank}.log" for rank in range(4)
        ]
    # As asked for, of the sixteen that a node has.
    for job, _ in jobs.values():
        assert cluster.facts(job)["TresPerNode"].endswith("gpu:2")


@pytest.mark.parametrize(
    ("script", "options", "overrides", "sentence"),
    [
        (
            "pretrain_srun.sbatch",
            "--nodes=2 --gpus-per-node=4 --ntasks-per-node=3",
            [],
            "error: --ntasks-per-node=3 x 2 nodes = 6 tasks, but --gpus-per-node=4 x 2 nodes = 8 GPUs, and each GPU "
            "has one rank; ask for --ntasks-per-node=4 or --gpus-per-node=3.",
        ),
        (
            "pretrain.sbatch",
            "--nodes=2 --gpus-per-node=2",
            ["batch.global_size=14"],
            "error: batch.global_size=14 is not divisible by batch.micro_size=3 x 4 ranks = 12; set batch.global_size "
            "to 12 or 24, or another batch.micro_size.",
        ),
        (
            "pretrain_deepspeed.sbatch",
            "--nodes=2 --gpus-per-node=2",
            ["launch.nproc_per_node=4"],
            "error: launch.nproc_per_node=4 x 2 nodes = 8 ranks, but the job has 2 GPUs on each = 4 ranks; remove "
            "launch.nproc_per_node, or ask Slurm for 4 a node.",
        ),
        (
            "pretrain.sbatch",
            "--nodes=1 --array=0-1",
            [],
            "would train the same run; put {task} into its name: sbatch --array=... SCRIPT CONFIG 'name=sweep-{task}'.",
        ),
    ],
)
def test_counts_that_do_not_fit_are_refused_with_the_arithmetic(
    cluster: Cluster,
    slurm_config: MakeConfig,
    tmp_path: Path,
    script: str,
    options: str,
    overrides: list[str],
    sentence: str,
) -> None:
    output = tmp_path / "job.out"
    job = cluster.submit(script, slurm_config("refused"), *overrides, output=output, options=options)
    facts = cluster.wait(job, 60)
    assert (facts["JobState"], facts["ExitCode"]) == ("FAILED", "2:0"), output.read_text()
    assert sentence in output.read_text()
    assert not (slurm_config("refused").parent / "runs" / "refused").exists()


def test_more_gpus_than_a_node_has_are_refused_at_once(cluster: Cluster, slurm_config: MakeConfig) -> None:
    refused = cluster.run(
        "sbatch", "--nodes=2", "--gpus-per-node=17", "slurm/pretrain.sbatch", slurm_config("refused"), check=False
    )
    assert "Requested node configuration is not available" in refused


@pytest.mark.slow
def test_scaling_is_measured_over_ranks_of_a_node_and_then_over_nodes(
    cluster: Cluster, slurm_config: MakeConfig, tmp_path: Path
) -> None:
    output, results = tmp_path / "scaling.out", tmp_path / "results"
    job = cluster.submit(
        "scaling.sbatch",
        *("--config", slurm_config("scaling"), "--strategies", "ddp", "--modes", "weak", "--pairs", 2),
        *("--profile-steps", 1, "--output", results),
        output=output,
        options="--nodes=2 --ntasks-per-node=2",
    )
    facts = cluster.wait(job, 380)
    printed = output.read_text()
    assert (facts["JobState"], facts["ExitCode"]) == ("COMPLETED", "0:0"), printed
    (raw,) = results.glob("*_4xcpu/scaling.jsonl")
    races = [row for row in map(json.loads, raw.read_text().splitlines()) if row["kind"] == "race"]
    assert [(race["num_ranks"], race["strategy"]) for race in races] == [(1, "none"), (2, "ddp"), (4, "ddp")]
    table = raw.with_suffix(".md").read_text()
    assert table in printed
    assert all(
        f"| 4 | {name} | 24 |" in table for name in ("plain", "shardline", "accelerate", "fabric", "transformers")
    )
    assert {path.suffix for path in raw.parent.iterdir()} == {".jsonl", ".md", ".svg"}
