"""Drills of bad numbers: a loss that is not finite, and one that leaps."""

from launcher.drills.outcome import Outcome
from launcher.drills.stage import STRIKE_AT, Stage
from sharding.errors import EXIT_FINISHED


def nan(stage: Stage) -> Outcome:
    """One rank's loss is not a number in one step: all ranks leave that step out."""
    outcome = Outcome("nan")
    run = stage.disturbed("nan")
    ended = run.run(environment=stage.faults({"fault": "nan"}))
    outcome.expect("the run finishes", ended.exit_code == EXIT_FINISHED, f"exit status {ended.exit_code}")
    skipped = [line["step"] for line in run.lines() if line["train/loss"] is None]
    outcome.expect("that step and no other is skipped", skipped == [STRIKE_AT], f"steps {skipped}")
    return outcome
