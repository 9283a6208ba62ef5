"""Drills of bad numbers: a loss that is not finite, and one that leaps."""

from launcher.drills.observed_run import ObservedRun
from launcher.drills.outcome import Outcome
from launcher.drills.stage import TRIGGER_STEP, Stage
from sharding.ranks.errors import EXIT_FINISHED

# A short run has few steps to compare with, and an injected spike is four orders of magnitude.
_DETECTOR = ("faults.spike_warmup_steps=4", "faults.spike_threshold=50")


def nan(stage: Stage) -> Outcome:
    """One rank's loss is not a number for the samples of one step: all ranks skip them."""
    outcome = Outcome("nan")
    run = stage.disturbed("nan", "faults.spike_policy=skip", *_DETECTOR)
    ended = run.run(environment=stage.faults({"fault": "nan"}))
    outcome.expect("the run finishes", ended.exit_code == EXIT_FINISHED, f"exit status {ended.exit_code}")
    _expect_left_out(outcome, stage, run, "nonfinite")
    outcome.expect("no step was applied with it", all(line["train/loss"] is not None for line in run.lines()))
    stage.compare(outcome, run, _told(stage))
    stage.time(outcome, run, triggered_at=run.triggered_at(), detected_at=_noticed_at(run, "nonfinite"))
    return outcome


def spike(stage: Stage) -> Outcome:
    """The loss of the samples of one step is 10,000 times what it should be: skip, and roll back."""
    outcome = Outcome("spike")
    for policy in ("skip", "rollback"):
        run = stage.disturbed(f"spike-{policy}", f"faults.spike_policy={policy}", *_DETECTOR)
        ended = run.run(environment=stage.faults({"fault": "spike"}))
        outcome.expect(f"under {policy} the run finishes", ended.exit_code == EXIT_FINISHED, f"exit {ended.exit_code}")
        _expect_left_out(outcome, stage, run, "spike")
        stage.compare(outcome, run, _told(stage))
        if policy == "rollback":
            rolled_back = run.events("rollback")
            outcome.expect("it rolls back to the checkpoint before", len(rolled_back) == 1, rolled_back[:1])
            stage.time(outcome, run, triggered_at=run.triggered_at(), detected_at=_noticed_at(run, "spike"))
    return outcome


def _told(stage: Stage) -> ObservedRun:
    """The run that is told from the start to skip the samples of the step in which the fault is triggered."""
    first, size = (TRIGGER_STEP - 1) * stage.config.batch.global_size, stage.config.batch.global_size
    return stage.told("told", f"data.skip_samples=[[{first}, {first + size}]]", *_DETECTOR)


def _expect_left_out(outcome: Outcome, stage: Stage, run: ObservedRun, kind: str) -> None:
    events, size = run.events(kind), stage.config.batch.global_size
    first = (TRIGGER_STEP - 1) * size
    names = len(events) == 1 and events[0]["samples"] == [[first, first + size]] and bool(events[0]["documents"])
    outcome.expect(
        "events.jsonl names step, samples and documents",
        names and events[0]["step"] == TRIGGER_STEP,
        f"step {events[0]['step']}, {len(events[0]['documents'])} documents" if events else f"no event {kind}",
    )


def _noticed_at(run: ObservedRun, kind: str) -> float | None:
    return min((event["time"] for event in run.events(kind)), default=None)
