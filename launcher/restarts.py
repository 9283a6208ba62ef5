"""When a failed attempt is followed by another in the same job, and when it is not."""

import signal
import sys
import time
from types import FrameType

from sharding.errors import EXIT_FAILED, EXIT_STOPPED
from trainer.events import record_event
from trainer.failure import Failure, FailureKind, read_failure
from trainer.run_folder import RunFolder
from trainer.sections import FaultsConfig

_SAME_FAILURES = 3
_MAX_BACKOFF_S = 300.0
_LOOK_EVERY_S = 0.1
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
# From outside, so that three of them in one place are no sign of anything.
_BY_CHANCE = (FailureKind.KILLED, FailureKind.LOST_NODE)
# Nothing would go otherwise.
_FOR_GOOD = (FailureKind.BAD_INPUT, FailureKind.NONFINITE)


class Restarts:
    """Counts the restarts of one ``shardline run`` and the failures that led to them."""

    def __init__(self, settings: FaultsConfig, run_folder: RunFolder) -> None:
        """None yet."""
        self._settings = settings
        self._run_folder = run_folder
        self._num_restarts = 0
        self._signatures: list[str] = []

    def after(self, attempt: int, exit_code: int) -> int | None:
        """Wait out the back-off after an attempt, where another is to follow.

        Call it from the main thread.

        Args:
            attempt: number of the attempt that ended.
            exit_code: its exit status.

        Returns:
            None where another attempt is to begin now, else the exit status of the run.
        """
        failure = read_failure(self._run_folder.path)
        if exit_code != EXIT_FAILED or failure is None or failure.kind in _FOR_GOOD or not self._settings.max_restarts:
            return exit_code
        if self._comes_again(failure):
            return exit_code
        if self._num_restarts == self._settings.max_restarts:
            print(f"not restarted: {self._num_restarts} restarts were all (faults.max_restarts)", file=sys.stderr)
            return exit_code
        self._num_restarts += 1
        backoff_s = min(self._settings.restart_backoff_s * 2 ** (self._num_restarts - 1), _MAX_BACKOFF_S)
        print(f"restart {self._num_restarts} of {self._settings.max_restarts} in {backoff_s:g} s", flush=True)
        record_event(
            self._run_folder.path,
            "restart",
            attempt=attempt,
            step=failure.step or 0,
            failure=failure.kind,
            rank=failure.rank,
            reason=failure.reason,
            backoff_s=backoff_s,
            num_left=self._settings.max_restarts - self._num_restarts,
        )
        return self._wait(backoff_s)

    def _comes_again(self, failure: Failure) -> bool:
        """Whether the same failure has come at the same step so often that another attempt is in vain; says so."""
        if failure.kind in _BY_CHANCE:
            self._signatures = []
            return False
        self._signatures.append(f"{failure.signature} at step {failure.step}")
        latest = self._signatures[-_SAME_FAILURES:]
        if len(latest) < _SAME_FAILURES or len(set(latest)) > 1:
            return False
        reason = (
            f"the same failure came {_SAME_FAILURES} times in a row at step {failure.step}: {failure.reason}; mend it, "
            "or set data.skip_samples where it is the data, and run again to continue from the last checkpoint."
        )
        self._replace_outcome("failed", EXIT_FAILED, failure.step or 0, reason, failure.rank)
        print(f"error: {reason}", file=sys.stderr)
        return True

    def _wait(self, backoff_s: float) -> int | None:
        signals: list[int] = []

        def receive(number: int, _frame: FrameType | None) -> None:
            signals.append(number)

        previous = {number: signal.signal(number, receive) for number in _SIGNALS}
        try:
            until = time.monotonic() + backoff_s
            while not signals and not self._run_folder.stop_file.exists():
                if time.monotonic() >= until:
                    return None
                time.sleep(_LOOK_EVERY_S)
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
        newest = self._run_folder.newest_checkpoint()
        step = 0 if newest is None else newest[0]
        self._replace_outcome("stopped", EXIT_STOPPED, step, "stopped before a restart; run again to continue", None)
        print(f"stopped before the restart; the same command continues after step {step}")
        return EXIT_STOPPED

    def _replace_outcome(self, status: str, exit_code: int, step: int, reason: str, rank: int | None) -> None:
        self._run_folder.outcome_file.unlink(missing_ok=True)
        self._run_folder.write_outcome(status, exit_code, step, reason, rank)
