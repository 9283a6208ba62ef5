"""The report and goodput that a run writes when it ends. Nothing depends on them: what goes wrong is a warning."""

import contextlib
from collections.abc import Callable

from trainer.failure import FAILURE_NAME
from trainer.goodput import write_goodput
from trainer.lease import is_taken_over
from trainer.run_folder import RunFolder


def write_run_goodput(run_folder: RunFolder, lease_token: str | None) -> None:
    """Write goodput.json, unless the folder is another process's by now; nothing depends on it.

    Args:
        run_folder: the run's folder.
        lease_token: proof that the folder is ours; None where no lease was taken.
    """
    with contextlib.suppress(OSError):
        if not is_taken_over(run_folder.path, lease_token):
            write_goodput(run_folder.path)


def write_run_report(run_folder: RunFolder, lease_token: str | None, warn: Callable[[str], None]) -> None:
    """Write report.html, unless it is there and newer than what it shows, or the folder is another process's by now.

    Args:
        run_folder: the run's folder.
        lease_token: proof that the folder is ours; None where no lease was taken.
        warn: tells a person why there is no report.
    """
    write_run_goodput(run_folder, lease_token)
    try:
        if is_taken_over(run_folder.path, lease_token) or _is_current(run_folder):
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
