"""What another attempt after a failure is worth, and how long to wait for it. Imports no torch."""

from pathlib import Path

from trainer.config.faults import FaultsConfig
from trainer.faults.failure.record import Failure, FailureKind, read_failure
from trainer.metrics.goodput import read_ledgers
from trainer.run_folder.folder import RunFolder

_SAME_FAILURES = 3
_MAX_BACKOFF_S = 300.0
# From outside, so that three of them in one place are no sign of anything.
_BY_CHANCE = (FailureKind.KILLED, FailureKind.LOST_NODE)
# Nothing would go otherwise.
_FOR_GOOD = (FailureKind.BAD_INPUT, FailureKind.NONFINITE)


def backoff_s(settings: FaultsConfig, num_restarts: int) -> float:
    """Seconds to wait before a restart, the first of which is 1."""
    return min(settings.restart_backoff_s * 2 ** (num_restarts - 1), _MAX_BACKOFF_S)


def num_restarts_that_count(run_folder: RunFolder, attempt: int, num_restarts: int, refill_steps: int) -> int:
    """How many of the restarts before a failed attempt still count: those since the last attempt that got on well.

    Only steps that no attempt before had reached are progress: a run that always falls back to the same checkpoint
    makes none.

    Args:
        run_folder: the run.
        attempt: number of the attempt that failed.
        num_restarts: restarts so far, each of which began one of the latest attempts.
        refill_steps: steps of progress after which earlier restarts do not count; 0 for never.
    """
    if refill_steps == 0:
        return num_restarts
    reached: dict[int, int] = {}
    for ledger in read_ledgers(run_folder.path):
        reached[ledger.attempt] = max(ledger.last_step or 0, reached.get(ledger.attempt, 0))
    for counted in range(num_restarts):
        latest = attempt - counted
        before = max((step for number, step in reached.items() if number < latest), default=0)
        if reached.get(latest, 0) - before >= refill_steps:
            return counted
    return num_restarts


def is_for_good(failure: Failure) -> bool:
    """Whether another attempt could only fail in the same way."""
    return failure.kind in _FOR_GOOD


def repeated_failure(run_folder: RunFolder) -> str | None:
    """A sentence where the newest attempt and those before it failed alike, at the same step; else None.

    Their reports are in the run's folder, so it does not matter who started which attempt.
    """
    newest = read_failure(run_folder.path)
    if newest is None or newest.kind in _BY_CHANCE:
        return None
    before = range(newest.attempt - 1, newest.attempt - _SAME_FAILURES, -1)
    if not all(_is_same(newest, run_folder.log_dir(attempt)) for attempt in before):
        return None
    return (
        f"the same failure came {_SAME_FAILURES} times in a row at step {newest.step}: {newest.reason}; mend it, "
        "or set data.skip_samples where it is the data, and run again to continue from the last checkpoint."
    )


def _is_same(failure: Failure, log_dir: Path) -> bool:
    other = read_failure(log_dir)
    return other is not None and (other.signature, other.step) == (failure.signature, failure.step)
