"""Drills of runs that are interrupted, hang or slow down."""

import os
import signal
import time

from launcher.drills.observed_run import ObservedRun
from launcher.drills.outcome import Outcome
from launcher.drills.stage import TRIGGER_STEP, Stage
from sharding.ranks.errors import EXIT_FINISHED, EXIT_STOPPED
from trainer.metrics.stragglers import NUM_INTERVALS

# Of each step.
_SLOWER_S = 1.5


def kill(stage: Stage) -> Outcome:
    """A rank is killed in the middle of a step."""
    outcome = Outcome("kill")
    run = stage.disturbed("kill", "faults.max_restarts=1")
    ended = run.run_until_finished(environment=stage.faults({"fault": "kill", "attempt": 1}))
    outcome.expect("the run finishes", ended.exit_code == EXIT_FINISHED, f"exit status {ended.exit_code}")
    _expect_failure(outcome, run, kind="killed", rank=stage.victim)
    stage.compare(outcome, run)
    stage.time(outcome, run, triggered_at=run.triggered_at(), detected_at=run.noticed_at())
    return outcome


def term(stage: Stage) -> Outcome:
    """SIGTERM reaches the launcher, as from a batch system: save, stop, and go on later."""
    outcome = Outcome("term")
    run = stage.disturbed("term")
    asked_at: list[float] = []

    def terminate(pid: int) -> None:
        os.kill(pid, signal.SIGTERM)
        asked_at.append(time.time())

    slow = stage.faults({"fault": "slow", "seconds": 0.5, "step": 2, "num_steps": 10, "attempt": 1})
    ended = run.run(environment=slow, when=lambda: run.has_reached(TRIGGER_STEP - 2), then=terminate)
    outcome.expect("it saves and ends with 75", ended.exit_code == EXIT_STOPPED, f"exit status {ended.exit_code}")
    saved = run.folder.newest_checkpoint()
    last = run.lines()[-1]["step"]
    outcome.expect("no step is lost", saved is not None and saved[0] == last, f"saved after step {last}")
    again = run.run_until_finished()
    outcome.expect("the same command finishes it", again.exit_code == EXIT_FINISHED, f"exit status {again.exit_code}")
    stage.compare(outcome, run)
    stage.time(outcome, run, triggered_at=asked_at[0], detected_at=ended.at)
    return outcome


def hang(stage: Stage) -> Outcome:
    """A rank stops in the middle of a step and says nothing."""
    outcome = Outcome("hang")
    run = stage.disturbed("hang", "faults.max_restarts=1", "faults.watchdog_min_s=5")
    ended = run.run_until_finished(environment=stage.faults({"fault": "hang", "attempt": 1}))
    outcome.expect("the run finishes", ended.exit_code == EXIT_FINISHED, f"exit status {ended.exit_code}")
    failure = _expect_failure(outcome, run, kind="hang", rank=stage.victim)
    outcome.expect("it names the step", failure.get("step") == TRIGGER_STEP, f"step {failure.get('step')}")
    stage.compare(outcome, run)
    stage.time(
        outcome,
        run,
        triggered_at=run.triggered_at(),
        detected_at=run.noticed_at(),
        deadline_s=run.alarm(attempt=1).get("allowance_s") or 0.0,
    )
    return outcome


def slow(stage: Stage) -> Outcome:
    """A rank is slow, but alive: it is named, and nothing is ended."""
    outcome = Outcome("slow")
    run = stage.disturbed("slow")
    slow = {"fault": "slow", "seconds": _SLOWER_S, "step": 3, "num_steps": 9}
    ended = run.run(environment=stage.faults(slow))
    outcome.expect("the run finishes at once", ended.exit_code == EXIT_FINISHED, f"exit status {ended.exit_code}")
    named = run.events("straggler")
    outcome.expect(
        "the slow rank is named",
        bool(named) and all(event["rank"] == stage.victim for event in named),
        f"rank {named[0]['rank']} at step {named[0]['step']}" if named else "no rank named",
    )
    stage.compare(outcome, run)
    stage.time(
        outcome,
        run,
        triggered_at=run.triggered_at(),
        detected_at=named[0]["time"] if named else None,
        deadline_s=NUM_INTERVALS * _SLOWER_S,
    )
    return outcome


def _expect_failure(outcome: Outcome, run: ObservedRun, *, kind: str, rank: int) -> dict[str, object]:
    """Claim that the first attempt's failure report names kind and rank; returns the report."""
    failure = run.failure(attempt=1)
    found = f"{failure.get('kind')}, rank {failure.get('rank')}" if failure else "no report"
    outcome.expect(
        f"failure.json says {kind} and rank {rank}", failure.get("kind") == kind and failure.get("rank") == rank, found
    )
    return failure
