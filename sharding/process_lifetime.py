"""Processes that end with whoever started them."""

import ctypes
import os
import signal
import sys
from collections.abc import Mapping

LAUNCHER_PID_VARIABLE = "SHARDLINE_LAUNCHER_PID"
# `accelerate launch` sets it in every process, and of a single process no rank.
ACCELERATE_VARIABLE = "ACCELERATE_DYNAMO_BACKEND"
_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Have the kernel end this process with SIGKILL when its parent ends, however that happens; Linux only.

    What happens before this call is not covered, so make it the first thing a process does.
    """
    if not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    launcher = int(os.environ.get(LAUNCHER_PID_VARIABLE, "0"))
    # Parent or launcher may have died while this process was starting.
    if os.getppid() != parent or (launcher and not _is_running(launcher)):
        os.kill(os.getpid(), signal.SIGKILL)


def is_started_by_launcher(environment: Mapping[str, str]) -> bool:
    """Whether a launcher started this rank. A rank that a person started from a shell should outlive the shell."""
    return "RANK" in environment or ACCELERATE_VARIABLE in environment


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
