"""Processes that end with whoever started them."""

import ctypes
import os
import select
import signal
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

from sharding.ranks.process_stat import process_stat

LAUNCHER_PID_VARIABLE = "SHARDLINE_LAUNCHER_PID"
# `accelerate launch` sets it in every process, and of a single process no rank.
ACCELERATE_VARIABLE = "ACCELERATE_DYNAMO_BACKEND"
_PR_SET_PDEATHSIG = 1
_DEEPSPEED_COMMANDS = frozenset({"deepspeed", "ds", "deepspeed.pt", "deepspeed.launcher.runner"})


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


def stop_with_deepspeed() -> None:
    """Ask this rank to save and stop when the ``deepspeed`` command above it ends first; Linux only.

    That command dies of a signal alone. Its launcher, the ranks' parent, and the ranks would go on.
    """
    parent = process_stat(os.getppid())
    if parent is None or not _is_deepspeed_command(parent.parent):
        return
    try:
        descriptor = os.pidfd_open(parent.parent)
    except OSError:
        # Gone already, or a kernel older than 5.3.
        return
    threading.Thread(target=_stop_at_end_of, args=(descriptor,), name="deepspeed-watch", daemon=True).start()


def _stop_at_end_of(descriptor: int) -> None:
    select.select([descriptor], [], [])
    os.kill(os.getpid(), signal.SIGTERM)


def _is_deepspeed_command(pid: int) -> bool:
    """Whether a process is DeepSpeed's outer launcher, ``deepspeed`` or ``python -m deepspeed.launcher.runner``."""
    try:
        arguments = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    except OSError:
        return False
    return any(Path(argument).name in _DEEPSPEED_COMMANDS for argument in arguments[:3])


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
