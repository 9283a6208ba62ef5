"""When a failed attempt is followed by another in the same job, and when it is not."""

import sys
import time

from launcher.conclusion import saved_step
from launcher.stop_signals import StopSignals
from sharding.ranks.errors import EXIT_FAILED, EXIT_STOPPED
from sharding.ranks.sentences import print_error
from trainer.config.faults import FaultsConfig
from trainer.faults.failure.record import Failure, read_failure
from trainer.faults.failure.restart_policy import backoff_s, is_for_good, num_restarts_that_count, repeated_failure
from trainer.run_folder.events import record_event
from trainer.run_folder.folder import RunFolder

_LOOK_EVERY_S = 0.1


class Restarts:
    """Counts the restarts of one ``shardline run``, or of one start of a Slurm job."""

    def __init__(self, settings: FaultsConfig, run_folder: RunFolder, num_restarts: int = 0) -> None:
        """So many have been."""
        self._settings = settings
        self._run_folder = run_folder
        self._num_restarts = num_restarts

    def after(self, attempt: int, exit_code: int, signals: StopSignals) -> int | None:
        """Wait out the back-off after an attempt, where another is to follow.

        Args:
            attempt: number of the attempt that ended.
            exit_code: its exit status.
            signals: those that reach this process, also while the attempt was concluded.

        Returns:
            None where another attempt is to begin now, else the exit status of the run.
        """
        failure = read_failure(self._run_folder.path)
        if exit_code != EXIT_FAILED or failure is None or is_for_good(failure) or not self._settings.max_restarts:
            return exit_code
        if self._comes_again(failure):
            return exit_code
        num_counted = num_restarts_that_count(
            self._run_folder, attempt, self._num_restarts, self._settings.restart_refill_steps
        )
        if num_counted >= self._settings.max_restarts:
            print(f"not restarted: {num_counted} restarts were all (faults.max_restarts)", file=sys.stderr)
            return exit_code
        self._num_restarts += 1
        wait_s = backoff_s(self._settings, num_counted + 1)
        print(f"restart {num_counted + 1} of {self._settings.max_restarts} in {wait_s:g} s", flush=True)
        record_event(
            self._run_folder.path,
            "restart",
            attempt=attempt,
            step=failure.step or 0,
            failure=failure.kind,
            rank=failure.rank,
            reason=failure.reason,
            backoff_s=wait_s,
            num_left=self._settings.max_restarts - num_counted - 1,
        )
        return self._wait(wait_s, signals)

    def _comes_again(self, failure: Failure) -> bool:
        """Whether the same failure has come at the same step so often that another attempt is in vain; says so."""
        reason = repeated_failure(self._run_folder)
        if reason is None:
            return False
        self._run_folder.replace_outcome("failed", EXIT_FAILED, failure.step or 0, reason, failure.rank)
        print_error(reason)
        return True

    def _wait(self, wait_s: float, signals: StopSignals) -> int | None:
        until = time.monotonic() + wait_s
        while not signals.stop and not self._run_folder.stop_file.exists():
            if time.monotonic() >= until:
                return None
            time.sleep(_LOOK_EVERY_S)
        step = saved_step(self._run_folder)
        self._run_folder.replace_outcome(
            "stopped", EXIT_STOPPED, step, "stopped before a restart; run again to continue", None
        )
        print(f"stopped before the restart; the same command continues after step {step}")
        return EXIT_STOPPED
