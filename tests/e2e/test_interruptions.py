"""Runs that are killed, stopped or broken in the middle, and what is left of them."""

import fcntl
import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support import (
    ROOT,
    command_environment,
    from_zygote,
    kill,
    processes_of,
    rank_processes,
    read_metrics,
    shardline,
    slow_from,
    start_shardline,
    start_torchrun,
    trained,
    training_curve,
    wait_until,
)
from trainer.faults.failure.record import FailureKind, read_failure
from trainer.metrics.goodput import Goodput
from trainer.run_folder.events import read_events

MakeConfig = Callable[..., Path]
# Long enough to be caught in the middle, and slowed down a little by metrics at each step.
_LONG: dict[str, Any] = {"steps": 400, "checkpoint": {"every_steps": 10}, "schedule": {"total_steps": 400}}


def _last_step(run_dir: Path) -> int:
    lines = read_metrics(run_dir)
    return int(lines[-1]["step"]) if lines else 0


def _wait_for_step(run_dir: Path, step: int) -> None:
    wait_until(lambda: _last_step(run_dir) >= step, what=f"step {step}")


def _wait_for_nobody(run_dir: Path, timeout_s: float = 10) -> None:
    wait_until(lambda: not processes_of(run_dir), timeout_s, what=f"no process left of {processes_of(run_dir)}")


def _outcome(run_dir: Path) -> dict[str, Any]:
    outcome: dict[str, Any] = json.loads((run_dir / "outcome.json").read_text())
    return outcome


@pytest.mark.timeout(400)
def test_a_rank_then_the_launcher_are_killed_and_losses_stay_equal(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config("killed", **_LONG)
    runs = config.parent / "runs"

    # So that it is killed before it saves step 20.
    slowly = slow_from(13, 1)
    launcher = start_shardline("run", config, "--nproc-per-node", 2, log=tmp_path / "first.log", **slowly)
    _wait_for_step(runs / "killed", 12)
    kill(rank_processes(runs / "killed")[1])
    assert launcher.wait(60) == 1
    last_line = (tmp_path / "first.log").read_text().strip().splitlines()[-1]
    assert last_line.startswith("error: rank 1: the process was killed by SIGKILL")
    _wait_for_nobody(runs / "killed")
    assert _outcome(runs / "killed")["status"] == "failed"
    failure = read_failure(runs / "killed")
    assert failure is not None
    assert (failure.kind, failure.signature, failure.rank) == (FailureKind.KILLED, "killed", 1)
    first, second = (state.exit for state in failure.ranks)
    assert second == "SIGKILL"
    # On a busy machine the agent may have taken the other's status before the launcher came to look at it.
    assert first in ("status 1", None)
    # Rank 0 may have been waiting in the next step for a peer that was still logging this one.
    assert failure.ranks[0].step - failure.step in (0, 1)

    launcher = start_shardline("run", config, "--nproc-per-node", 2, log=tmp_path / "second.log")
    resumed_from = 10
    wait_until(lambda: "continuing after step" in (tmp_path / "second.log").read_text(), what="continuation")
    # A checkpoint is written while training goes on, and the account of time once a second.
    saved = runs / "killed" / "checkpoints" / "step-00000030" / "manifest.json"
    account = runs / "killed" / "logs" / "attempt-2" / "goodput.json"
    wait_until(saved.exists, what="step 30 saved")
    wait_until(lambda: (json.loads(account.read_text())["last_step"] or 0) >= 30, what="step 30 in the account")
    launcher.kill()
    launcher.wait()
    # Nobody is left to clean up: the kernel ends the agent, and with it the ranks.
    _wait_for_nobody(runs / "killed", timeout_s=5)

    trained(shardline("run", config, "steps=60", "--nproc-per-node", 2))
    assert read_failure(runs / "killed") is None
    assert read_failure(runs / "killed" / "logs" / "attempt-1") == failure
    straight = make_config("straight", **_LONG)
    trained(shardline("run", straight, "steps=60", "--nproc-per-node", 2))
    found = [row[:5] for row in training_curve(runs / "killed")]
    assert found == [row[:5] for row in training_curve(runs / "straight")]
    assert len(found) == 60 > resumed_from
    _check_goodput(runs / "killed")


def _check_goodput(run_dir: Path) -> None:
    """Of three attempts that took steps 1 to 60 the first two were killed."""
    goodput = Goodput.model_validate_json((run_dir / "goodput.json").read_bytes())
    assert sum(goodput.shares.values()) == pytest.approx(1, abs=1e-9)
    assert sum(goodput.seconds.values()) == pytest.approx(goodput.wall_s)
    first, second, third = goodput.attempts
    # The first rank outlived the other, and told of all its steps; then it was killed too, and told of those until its
    # last write.
    assert (first.began_after, second.began_after) == (0, 10)
    assert first.last_step is not None
    assert first.num_lost_steps == first.last_step - 10 >= 2
    assert second.last_step is not None
    assert third.began_after is not None
    assert second.num_lost_steps == max(0, second.last_step - third.began_after)
    assert second.last_step >= third.began_after >= 30
    assert (third.last_step, third.num_lost_steps) == (60, 0)
    assert goodput.num_lost_steps == first.num_lost_steps + second.num_lost_steps
    assert third.seconds["lost"] == 0 < first.seconds["lost"]
    assert all(goodput.seconds[name] > 0 for name in ("training", "startup", "checkpoint", "logging"))
    # Each was begun by hand, after a while that nobody waited for.
    assert goodput.seconds["down"] == 0 < goodput.idle_s
    logged = read_metrics(run_dir)[-1]["goodput/fraction"]
    assert goodput.goodput == goodput.shares["training"] == pytest.approx(logged, rel=0.5)


def test_ranks_and_restarts_train_what_was_frozen_whatever_becomes_of_the_users_file(make_config: MakeConfig) -> None:
    """The file is a pipe, which nobody can read twice."""
    config = make_config("frozen", steps=4, checkpoint={"every_steps": 2}, parallel={"strategy": "none"})
    fault = {"fault": "kill", "rank": 0, "step": 4, "phase": "train", "attempt": 1}
    reading, writing = os.pipe()
    os.write(writing, config.read_bytes())
    os.close(writing)
    settings = ["optimizer.lr=0.02", "faults.max_restarts=1", "faults.restart_backoff_s=0"]
    with from_zygote():
        finished = subprocess.run(
            [sys.executable, "-m", "launcher", "run", f"/dev/fd/{reading}", "--nproc-per-node=1", *settings],
            pass_fds=[reading],
            capture_output=True,
            text=True,
            timeout=200,
            cwd=ROOT,
            env=command_environment(SHARDLINE_INJECT=json.dumps([fault])),
            check=False,
        )
    os.close(reading)
    trained(finished)
    run_dir = config.parent / "runs" / "frozen"
    assert (run_dir / "config.attempt-2.yaml").read_bytes() == (run_dir / "config.yaml").read_bytes()
    assert [line["step"] for line in read_metrics(run_dir)] == [1, 2, 3, 4]
    assert [line["train/learning_rate"] for line in read_metrics(run_dir)][1] == pytest.approx(0.02)


def test_a_rank_that_is_killed_while_it_writes_leaves_no_checkpoint(make_config: MakeConfig) -> None:
    config = make_config("writing", steps=8, checkpoint={"every_steps": 3, "keep_last": 0})
    checkpoints = config.parent / "runs" / "writing" / "checkpoints"
    fault = {"fault": "kill", "rank": 1, "step": 6, "phase": "write", "attempt": 1}
    killed = shardline("run", config, "--nproc-per-node", 2, SHARDLINE_INJECT=json.dumps([fault]))
    assert killed.returncode == 1
    assert "rank 1: the process was killed by SIGKILL" in killed.stderr
    assert [path.parent.name for path in checkpoints.glob("*/manifest.json")] == ["step-00000003"]
    continued = shardline("run", config, "--nproc-per-node", 2)
    assert continued.returncode == 0, continued.stderr
    assert "continuing after step 3" in continued.stdout
    # What the killed attempt had written of it is not part of it.
    verified = shardline("checkpoint", "verify", checkpoints.parent)
    assert verified.stdout.splitlines() == [f"step-{step:08d}: complete" for step in (3, 6, 8)]


def test_ctrl_c_saves_and_the_same_command_continues(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config("stopped", **_LONG)
    run_dir = config.parent / "runs" / "stopped"
    launcher = start_shardline("run", config, "--nproc-per-node", 2, log=tmp_path / "log")
    _wait_for_step(run_dir, 5)
    launcher.send_signal(signal.SIGINT)
    assert launcher.wait(60) == 75
    _wait_for_nobody(run_dir)
    outcome = _outcome(run_dir)
    assert (outcome["status"], outcome["exit_code"]) == ("stopped", 75)
    assert outcome["step"] == _last_step(run_dir)
    assert (run_dir / "checkpoints" / f"step-{outcome['step']:08d}" / "manifest.json").exists()
    assert "run the same command again to continue" in (tmp_path / "log").read_text()
    trained(shardline("run", config, f"steps={outcome['step'] + 2}", "--nproc-per-node", 2))
    assert [line["step"] for line in read_metrics(run_dir)] == list(range(1, outcome["step"] + 3))
    assert not (run_dir / "metrics.discarded.jsonl").exists()


@pytest.mark.timing
def test_a_second_ctrl_c_ends_the_run_at_once(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config("interrupted", **_LONG)
    run_dir = config.parent / "runs" / "interrupted"
    launcher = start_shardline("run", config, "--nproc-per-node", 2, log=tmp_path / "log")
    _wait_for_step(run_dir, 3)
    # A rank that does not run cannot save, so only the second signal can end this.
    os.kill(rank_processes(run_dir)[1], signal.SIGSTOP)
    launcher.send_signal(signal.SIGINT)
    time.sleep(1.5)
    assert launcher.poll() is None
    launcher.send_signal(signal.SIGINT)
    assert launcher.wait(20) == 130
    _wait_for_nobody(run_dir)


def test_the_stop_file_stops_a_run(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config("asked", **_LONG)
    run_dir = config.parent / "runs" / "asked"
    launcher = start_shardline("run", config, "--nproc-per-node", 2, log=tmp_path / "log")
    _wait_for_step(run_dir, 2)
    (run_dir / "stop").touch()
    assert launcher.wait(60) == 75


@pytest.mark.timing
def test_a_signal_to_one_rank_stops_all_under_torchrun(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config("signalled", **_LONG)
    run_dir = config.parent / "runs" / "signalled"
    agent = start_torchrun(config, log=tmp_path / "log")
    _wait_for_step(run_dir, 3)
    with (run_dir / ".lease.lock").open() as lock:
        # Rank 0 cannot give the folder back: its last work takes long, as that of a tracker which sends what it has.
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.kill(rank_processes(run_dir)[1], signal.SIGHUP)
        wait_until((run_dir / "outcome.json").exists, what="the outcome")
        time.sleep(1.5)
        # The agent would end rank 0 soon after the first rank that has ended with 75.
        assert set(rank_processes(run_dir)) == {0, 1}
    # torchrun makes 1 of every status.
    assert agent.wait(60) == 1
    assert not (run_dir / "lease.json").exists()
    outcome = _outcome(run_dir)
    assert (outcome["status"], outcome["exit_code"]) == ("stopped", 75)
    assert (run_dir / "checkpoints" / f"step-{outcome['step']:08d}" / "manifest.json").exists()


def test_a_killed_torchrun_leaves_no_rank(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config("orphans", **_LONG)
    run_dir = config.parent / "runs" / "orphans"
    agent = start_torchrun(config, log=tmp_path / "log")
    _wait_for_step(run_dir, 1)
    assert len(rank_processes(run_dir)) == 2
    agent.kill()
    agent.wait()
    _wait_for_nobody(run_dir, timeout_s=5)


_FAILING_TASK = """
import torch.distributed as dist
from trainer.tasks.causal_lm import CausalLanguageModelling

class FailsOnRankOne(CausalLanguageModelling):
    steps = 0

    def make_batch(self, samples, positions, training):
        self.steps += 1
        if dist.get_rank() == 1 and self.steps > 4:
            raise ZeroDivisionError("the divisor on this rank is zero")
        return super().make_batch(samples, positions, training)
"""


def test_a_failing_ranks_own_error_is_seen_last_with_its_rank(make_config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "failing_task.py").write_text(_FAILING_TASK)
    config = make_config("failing", task={"name": "failing_task:FailsOnRankOne"})
    finished = shardline("run", config, "--nproc-per-node", 2, PYTHONPATH=f"{ROOT}{os.pathsep}{tmp_path}")
    assert finished.returncode == 1
    last_line = finished.stderr.strip().splitlines()[-1]
    assert last_line == "error: rank 1: ZeroDivisionError: the divisor on this rank is zero"
    run_dir = config.parent / "runs" / "failing"
    log = run_dir / "logs" / "attempt-1" / "rank-1.log"
    assert "failing_task.py" in log.read_text()
    failure = read_failure(run_dir)
    assert failure is not None
    assert (failure.kind, failure.rank) == (FailureKind.EXCEPTION, 1)
    assert failure.where is not None
    assert failure.where.endswith("failing_task.py:11 in make_batch")
    assert f"report: {run_dir / 'failure.md'}" in finished.stderr
    assert _outcome(config.parent / "runs" / "failing")["status"] == "failed"


_FLIPPING_TASK = """
import torch
import torch.distributed as dist
from trainer.tasks.causal_lm import CausalLanguageModelling

class FlipsABit(CausalLanguageModelling):
    calls = 0

    def forward(self, model, batch):
        self.calls += 1
        # Each step has two micro-batches; the fifth step's first.
        if dist.get_rank() == 1 and self.calls == 9:
            weight = next(iter(model.parameters()))
            weight.data.view(torch.int32).view(-1)[5] ^= 1 << 20
        return super().forward(model, batch)
"""


def test_a_rank_whose_parameters_changed_by_themselves_ends_the_run(make_config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "flipping_task.py").write_text(_FLIPPING_TASK)
    config = make_config(
        "flipped",
        task={"name": "flipping_task:FlipsABit"},
        parallel={"strategy": "ddp"},
        checkpoint={"every_steps": 3},
        faults={"replica_check_every_steps": 100},
    )
    finished = shardline("run", config, "--nproc-per-node", 2, PYTHONPATH=f"{ROOT}{os.pathsep}{tmp_path}")
    run_dir = config.parent / "runs" / "flipped"
    assert finished.returncode == 1
    assert "parameters did not after step 6: rank 0 (" in finished.stderr.strip().splitlines()[-1]
    event = read_events(run_dir)[-1]
    assert (event["kind"], event["step"], event["ranks"]) == ("replica_mismatch", 6, [0, 1])
    # What differs was not saved.
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step-00000003"]


def test_a_diverging_run_skips_together_and_stops_with_the_reason(make_config: MakeConfig) -> None:
    config = make_config(
        "diverging",
        steps=40,
        optimizer={"name": "sgd", "lr": 1e30, "clip_norm": 0.0, "momentum": 0.0, "weight_decay": 0.0},
        schedule={"name": "constant", "warmup_steps": 0, "total_steps": 0},
        faults={"max_nonfinite_steps": 3},
    )
    finished = shardline("run", config, "--nproc-per-node", 2)
    assert finished.returncode == 1
    assert "not finite in 3 steps in a row" in finished.stderr.splitlines()[-1]
    lines = read_metrics(config.parent / "runs" / "diverging")
    assert lines[-1]["train/skipped_steps"] == 3
    assert lines[-1]["train/grad_norm"] is None


def test_a_terminal_sees_a_live_progress_line(make_config: MakeConfig) -> None:
    config = make_config("terminal", steps=3)
    parent, child = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "launcher", "run", str(config)],
        stdout=child,
        stderr=child,
        stdin=child,
        cwd=ROOT,
        env=command_environment(TERM="xterm-256color", COLUMNS="120", LINES="30"),
    )
    os.close(child)
    shown = b""
    while True:
        try:
            chunk = os.read(parent, 65536)
        except OSError:
            break
        if not chunk:
            break
        shown += chunk
    os.close(parent)
    assert process.wait(60) == 0
    text = shown.decode(errors="replace")
    assert "step 3/3" in text
    assert "tokens/s" in text
    # A bar that is drawn again in place.
    assert "\x1b[2K" in text or "\x1b[1A" in text


def test_two_runs_do_not_share_a_folder(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config("shared", **_LONG)
    run_dir = config.parent / "runs" / "shared"
    first = start_shardline("run", config, "--nproc-per-node", 2, log=tmp_path / "log")
    _wait_for_step(run_dir, 1)
    second = shardline("run", config, "--nproc-per-node", 2)
    assert second.returncode == 2
    assert f"process {first.pid} on " in second.stderr
    assert len(second.stderr.strip().splitlines()) == 1
    assert first.poll() is None
    first.send_signal(signal.SIGINT)
    assert first.wait(60) == 75
