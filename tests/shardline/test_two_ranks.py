"""A script under torchrun: runs in the same processes, observers on rank 0 alone, and a rank that fails."""

import json
import subprocess
import time
from pathlib import Path

import pytest

from sharding.ranks.local_group import free_port
from shardline import Run
from tests.shardline.own_parts import settings
from tests.shardline.two_ranks import _LAYOUTS
from tests.support import read_metrics, run_module, trained, training_curve
from trainer.config import config_to_yaml, load_config

pytestmark = pytest.mark.timeout(200)


def _torchrun(case: str, root: Path, *options: str) -> subprocess.CompletedProcess[str]:
    options = (*options, "--nproc-per-node=2", f"--master-port={free_port()}", "-m", "tests.shardline.two_ranks")
    return run_module("torch.distributed.run", *options, case, root, timeout_s=180)


def test_runs_follow_one_another_in_the_same_ranks(tmp_path: Path) -> None:
    finished = _torchrun("several", tmp_path)
    trained(finished)
    told, others = (json.loads((tmp_path / f"several-{rank}.json").read_text()) for rank in (0, 1))
    curves = [training_curve(tmp_path / "runs" / f"{backend}-{strategy}") for backend, strategy in _LAYOUTS]
    for (status, exit_code, step, metrics, failed_after, steps), other, curve, layout in zip(
        told[0], others[0], curves, _LAYOUTS, strict=True
    ):
        assert (status, exit_code, step) == ("finished", 0, 6)
        assert metrics == read_metrics(tmp_path / "runs" / "-".join(layout))[-1]
        # On rank 0 alone; the result is the same on both.
        assert (failed_after, steps) == ([2, 3], [2, 3, 4, 6])
        assert other == [status, exit_code, step, metrics, [], []]
        assert [line[1] for line in curve] == pytest.approx([line[1] for line in curves[0]], rel=1e-5)
    assert told[1] == others[1]
    assert told[1]["samples"] == 13
    assert finished.stdout.count("goes on") == 2
    log = (tmp_path / "runs" / "torch-zero2" / "logs" / "attempt-1" / "rank-1.log").read_text()
    assert "deepspeed" not in log.lower()
    # As a rank of a command trains.
    config = load_config(
        settings(tmp_path, "command", parallel={"backend": "torch", "strategy": "zero2"}),
        own={"model": ("tests.shardline.own_parts:Network", None), "data": ("tests.shardline.own_parts:Points", None)},
    )
    file = tmp_path / "command.yaml"
    file.write_text(config_to_yaml(config))
    options = ("--nproc-per-node=2", f"--master-port={free_port()}", "-m", "trainer")
    trained(run_module("torch.distributed.run", *options, file))
    assert training_curve(tmp_path / "runs" / "command") == curves[0]


def test_a_rank_that_fails_alone_ends_though_its_script_goes_on(tmp_path: Path) -> None:
    begun = time.monotonic()
    finished = _torchrun("fails", tmp_path)
    assert finished.returncode == 1
    assert "rank 1 caught sample 15 cannot be read" in finished.stdout
    assert time.monotonic() - begun < 120
    outcome = json.loads((tmp_path / "runs" / "fails" / "outcome.json").read_text())
    assert (outcome["status"], outcome["exit_code"], outcome["rank"]) == ("failed", 1, 1)


def test_ranks_that_torchrun_starts_again_go_on_with_the_run_that_was_killed(tmp_path: Path) -> None:
    trained(_torchrun("restarted", tmp_path, "--max-restarts=1"))
    first, second = (Run(tmp_path / "runs" / name) for name in ("first", "second"))
    assert training_curve(first.path) == training_curve(second.path)
    assert [len(list(run.path.glob("logs/attempt-*"))) for run in (first, second)] == [2, 2]
    (restart,) = [
        json.loads(line) for line in (second.path / "events.jsonl").read_text().splitlines() if "restart" in line
    ]
    assert restart["num_left"] == 0
