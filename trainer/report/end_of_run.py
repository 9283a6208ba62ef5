"""The report and goodput that a run writes when it ends. Nothing depends on them: what goes wrong is a warning."""

import contextlib
from collections.abc import Callable

from trainer.faults.failure.record import FAILURE_NAME
from trainer.metrics.goodput import write_goodput
from trainer.run_folder.folder import RunFolder


def write_run_goodput(run_folder: RunFolder) -> None:
    """Write goodput.json, unless the folder is another process's by now; nothing depends on it."""
    with contextlib.suppress(OSError):
        if not run_folder.is_taken_over:
            write_goodput(run_folder.path)


def write_run_report(run_folder: RunFolder, warn: Callable[[str], None]) -> None:
    """Write report.html, unless it is there and newer than what it shows, or the folder is another process's by now.

    Args:
        run_folder: the run's folder.
        warn: tells a person why there is no report.
    """
    write_run_goodput(run_folder)
    try:
        if run_folder.is_taken_over or _is_current(run_folder):
            return
        # Not needed until a run ends.
        from trainer.report.page import write_report

        write_report([run_folder.path], run_folder.report_file)
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - no report may change how a run ends
        warn(f"{run_folder.report_file} was not written: {str(error) or type(error).__name__}")


def _is_current(run_folder: RunFolder) -> bool:
    failure_file = run_folder.path / FAILURE_NAME
    try:
        # The launcher knows more of a failure than rank 0 did.
        newest = [path.stat().st_mtime_ns for path in (run_folder.outcome_file, failure_file) if path.exists()]
        return bool(newest) and run_folder.report_file.stat().st_mtime_ns > max(newest)
    except FileNotFoundError:
        return False
