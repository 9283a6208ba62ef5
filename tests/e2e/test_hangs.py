"""Ranks that hang: found, named and ended, with their stacks and collectives on record."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import (
    ROOT,
    processes_of,
    rank_processes,
    read_metrics,
    start_shardline,
    start_torchrun,
    wait_until,
)
from trainer.faults.failure.record import Failure, FailureKind, read_failure
from trainer.faults.injection.inject import INJECT_VARIABLE
from trainer.run_folder.events import read_events

MakeConfig = Callable[..., Path]
StartRun = Callable[..., subprocess.Popen[bytes]]
_SETTINGS: dict[str, Any] = {
    "steps": 400,
    "schedule": {"total_steps": 400},
    "faults": {"watchdog_min_s": 3.0},
}


@pytest.fixture
def start_watched(tmp_path: Path) -> Iterator[StartRun]:
    """Start ranks under a bare torchrun; whatever a failed test leaves is ended."""
    started: list[subprocess.Popen[bytes]] = []

    def start(config: Path, **environment: str) -> subprocess.Popen[bytes]:
        started.append(start_torchrun(config, log=tmp_path / "log", **environment))
        return started[-1]

    yield start
    for process in started:
        # The ranks end with it.
        process.kill()
        process.wait()


def _report(run_dir: Path, status: int) -> Failure:
    """What the run says of its end; the same in every place, and nobody is left."""
    assert status == 1
    wait_until(lambda: not processes_of(run_dir), timeout_s=10, what="no process left")
    failure = read_failure(run_dir)
    assert failure is not None
    outcome = json.loads((run_dir / "outcome.json").read_text())
    assert (outcome["status"], outcome["rank"], outcome["reason"]) == ("failed", 1, failure.reason)
    assert failure.reason in (run_dir / "failure.md").read_text()
    assert (failure.kind, failure.rank) == (FailureKind.HANG, 1)
    return failure


def _detection_s(run_dir: Path, triggered_at: float) -> float:
    """Seconds from the deadline of whoever raised the alarm to the verdict."""
    alarm = json.loads((run_dir / "logs" / "attempt-1" / "alarm.json").read_text())
    (hang,) = [event for event in read_events(run_dir) if event["kind"] == "hang"]
    return float(hang["time"] - triggered_at - alarm["allowance_s"])


@pytest.mark.timing
def test_a_rank_that_sleeps_is_named_with_line_step_and_collective(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault = {"fault": "hang", "rank": 1, "step": 12}
    monkeypatch.setenv(INJECT_VARIABLE, json.dumps([fault]))
    config = make_config("sleeping", **_SETTINGS)
    run_dir = config.parent / "runs" / "sleeping"
    launcher = start_shardline("run", config, "--nproc-per-node", 2, log=tmp_path / "log")
    failure = _report(run_dir, launcher.wait(120))
    (struck,) = [event for event in read_events(run_dir) if event["kind"] == "injected"]
    assert _detection_s(run_dir, struck["time"]) < 10
    assert (failure.phase, failure.step) == ("train", 12)
    assert failure.where is not None
    assert failure.where.startswith("injection/inject.py:")
    assert failure.where.endswith(" in _inject")
    assert failure.signature == f"hang at {failure.where} in step 12"
    assert failure.collective is not None
    assert f"rank 0 waited in {failure.collective}." in failure.reason
    waiting, late = failure.ranks
    assert (waiting.role, waiting.collective, late.role) == ("waiting", failure.collective, "late")
    assert set(failure.logs) >= {f"logs/attempt-1/rank-1.{end}" for end in ("log", "stacks.txt", "flight.json")}
    last_line = (tmp_path / "log").read_text().strip().splitlines()[-1]
    assert last_line == f"error: {failure.reason}"
    assert "hang" in (run_dir / "report.html").read_text()


_HOLDING_TASK = """
import re
import torch.distributed as dist
from trainer.tasks.causal_lm import CausalLanguageModelling

class HoldsTheLock(CausalLanguageModelling):
    num_batches = 0

    def make_batch(self, samples, positions, training):
        self.num_batches += 1
        if dist.get_rank() == 1 and self.num_batches > 20:
            # Takes ages, in C, and lets no other thread of Python run.
            re.match(r"(a+)+$", "a" * 60 + "b")
        return super().make_batch(samples, positions, training)
"""


@pytest.mark.timing
def test_a_rank_whose_native_code_lets_no_python_run_is_found_by_the_others_under_torchrun(
    make_config: MakeConfig, tmp_path: Path, start_watched: StartRun
) -> None:
    (tmp_path / "holding_task.py").write_text(_HOLDING_TASK)
    config = make_config("holding", task={"name": "holding_task:HoldsTheLock"}, **_SETTINGS)
    run_dir = config.parent / "runs" / "holding"
    agent = start_watched(config, PYTHONPATH=f"{ROOT}{os.pathsep}{tmp_path}")
    failure = _report(run_dir, agent.wait(120))
    assert "rank 1 on " in failure.reason
    assert " no longer answered for " in failure.reason
    # Its stacks were written by its fault handler, in C.
    assert failure.where is not None
    assert failure.where.endswith(" in make_batch")
    assert "holding_task.py" in failure.where
    assert failure.ranks[0].role == "waiting"


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["shardline", "torchrun"])
def test_a_stopped_rank_is_a_hang(
    make_config: MakeConfig, tmp_path: Path, start_watched: StartRun, launcher: str
) -> None:
    config = make_config("stopped", **_SETTINGS)
    run_dir = config.parent / "runs" / "stopped"
    if launcher == "shardline":
        process = start_shardline("run", config, "--nproc-per-node", 2, log=tmp_path / "log")
    else:
        process = start_watched(config)
    wait_until(lambda: len(read_metrics(run_dir)) >= 12, what="step 12")
    os.kill(rank_processes(run_dir)[1], signal.SIGSTOP)
    triggered_at = time.time()
    failure = _report(run_dir, process.wait(120))
    assert _detection_s(run_dir, triggered_at) < 10
    assert "its process being in state T (stopped)" in failure.reason
    assert "rank 0 waited in " in failure.reason


@pytest.mark.slow
def test_a_job_that_is_stopped_and_continued_as_a_whole_goes_on(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config("suspended", **_SETTINGS)
    run_dir = config.parent / "runs" / "suspended"
    launcher = start_shardline("run", config, "steps=40", "--nproc-per-node", 2, log=tmp_path / "log")
    wait_until(lambda: len(read_metrics(run_dir)) >= 12, what="step 12")
    processes = [launcher.pid, *rank_processes(run_dir).values()]
    for pid in processes:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(12)
    for pid in processes:
        os.kill(pid, signal.SIGCONT)
    assert launcher.wait(120) == 0
    assert read_failure(run_dir) is None
