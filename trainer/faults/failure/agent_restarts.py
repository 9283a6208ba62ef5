"""Ranks that torchrun's own agent has started again: each waits, and ends at once where another attempt is in vain.

``shardline run`` decides about its restarts itself, see ``launcher.restarts``. Imports no torch.
"""

import os
import sys
import time
from collections.abc import Sequence

from sharding.ranks.errors import EXIT_BAD_INPUT, EXIT_FAILED, EXIT_FINISHED, EXIT_STOPPED, UserError
from trainer.config import RunConfig, load_config
from trainer.faults.failure.record import read_failure
from trainer.faults.failure.restart_policy import backoff_s, is_for_good, num_restarts_that_count, repeated_failure
from trainer.run_folder.events import record_event
from trainer.run_folder.folder import RunFolder


def await_restart(arguments: Sequence[str], num_restarts: int) -> int | None:
    """``await_restart_of`` the run that ``python -m trainer`` was given, configuration file and ``key=value``."""
    try:
        config = load_config(arguments[0], arguments[1:])
    except (UserError, IndexError):
        # The rank itself will say so.
        return None
    return await_restart_of(config, num_restarts)


def await_restart_of(config: RunConfig, num_restarts: int) -> int | None:
    """Wait out the back-off.

    Every rank decides by itself from what the attempt before has left, which is there until rank 0 begins another.

    Args:
        config: the run.
        num_restarts: how often the agent has started this rank again.

    Returns:
        The exit status for a rank that is to end at once, else None. The agent starts a rank again whatever it ends
        with but 0, which costs a moment each.
    """
    run_folder, is_first = RunFolder(config.run_dir), os.environ.get("RANK") == "0"
    outcome, failure = run_folder.read_outcome() or {}, read_failure(run_folder.path)
    if outcome.get("exit_code") in (EXIT_FINISHED, EXIT_STOPPED):
        return EXIT_FINISHED
    if outcome.get("exit_code") == EXIT_BAD_INPUT:
        return EXIT_BAD_INPUT
    reason = repeated_failure(run_folder)
    if reason is not None and failure is not None and is_first and outcome.get("reason") != reason:
        run_folder.replace_outcome("failed", EXIT_FAILED, failure.step or 0, reason, failure.rank)
        print(f"error: {reason}", file=sys.stderr)
    if reason is not None or (failure is not None and is_for_good(failure)):
        return EXIT_FAILED
    num_counted = num_restarts_that_count(
        run_folder, run_folder.newest_attempt(), num_restarts - 1, config.faults.restart_refill_steps
    )
    wait_s = backoff_s(config.faults, num_counted + 1)
    if is_first:
        record_event(
            run_folder.path,
            "restart",
            attempt=run_folder.newest_attempt(),
            step=(failure.step if failure is not None else outcome.get("step")) or 0,
            failure=failure.kind if failure is not None else None,
            rank=failure.rank if failure is not None else None,
            reason=failure.reason if failure is not None else "a rank ended and could not say why",
            backoff_s=wait_s,
            num_left=int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) - num_restarts,
        )
    time.sleep(wait_s)
    return None
