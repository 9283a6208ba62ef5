"""What another attempt after a failure is worth, and how long to wait for it. Imports no torch."""

from pathlib import Path

from trainer.failure import Failure, FailureKind, read_failure
from trainer.run_folder import RunFolder
from trainer.sections import FaultsConfig

_SAME_FAILURES = 3
_MAX_BACKOFF_S = 300.0
# From outside, so that three of them in one place are no sign of anything.
_BY_CHANCE = (FailureKind.KILLED, FailureKind.LOST_NODE)
# Nothing would go otherwise.
_FOR_GOOD = (FailureKind.BAD_INPUT, FailureKind.NONFINITE)


def backoff_s(settings: FaultsConfig, num_restarts: int) -> float:
    """Seconds to wait before a restart, the first of which is 1."""
    return min(settings.restart_backoff_s * 2 ** (num_restarts - 1), _MAX_BACKOFF_S)


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
