"""A rank's process as another one of its machine sees it: its state, whether it is debugged, stacks on request."""

import contextlib
import os
import signal
import sys
import threading
from pathlib import Path
from types import FrameType

from sharding.ranks.process_stat import process_stat
from trainer.faults.hang.heartbeat import Heartbeat
from trainer.faults.hang.stacks import STACKS_SIGNAL
from trainer.runtime.processes import process_space

_DEBUGGERS = ("pydevd", "debugpy")
_STATES = {"R": "running", "S": "sleeping", "D": "uninterruptible sleep", "T": "stopped", "t": "traced", "Z": "zombie"}


def process_state(heartbeat: Heartbeat) -> str | None:
    """State letter and word of a rank's process; ``gone``, or None where it is on another machine."""
    if heartbeat.process_space != process_space():
        return None
    process = process_stat(heartbeat.pid)
    if process is None:
        return "gone"
    return f"{process.state} ({_STATES[process.state]})" if process.state in _STATES else process.state


def is_debugged(heartbeat: Heartbeat) -> bool:
    """Whether a rank says that somebody debugs it, or its machine is this one and its kernel says so."""
    return heartbeat.state == "debugged" or (heartbeat.process_space == process_space() and _is_traced(heartbeat.pid))


def am_i_debugged() -> bool:
    """Whether this process is: by gdb and its like, by an IDE, or at a pdb prompt in its main thread."""
    if _is_traced(os.getpid()) or any(name in sys.modules for name in _DEBUGGERS):
        return True
    frame: FrameType | None = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None:
        if frame.f_globals.get("__name__") in ("bdb", "pdb"):
            return True
        frame = frame.f_back
    return False


def ask_for_stacks(heartbeat: Heartbeat) -> None:
    """Have a rank of this machine write its stacks, which needs no Python to run there."""
    _signal(heartbeat, STACKS_SIGNAL)


def kill(heartbeat: Heartbeat) -> None:
    """End a rank of this machine."""
    _signal(heartbeat, signal.SIGKILL)


def _signal(heartbeat: Heartbeat, number: signal.Signals) -> None:
    # Whoever writes heartbeats has taken the signal for stacks; another process may have the number by now, unless its
    # working files say that it is a rank of the same folder.
    if process_state(heartbeat) in (None, "gone") or not _holds_open(heartbeat):
        return
    with contextlib.suppress(OSError):
        os.kill(heartbeat.pid, number)


def _holds_open(heartbeat: Heartbeat) -> bool:
    """Whether the process still has its own heartbeat file open."""
    name = f"rank-{heartbeat.rank}.heartbeat.json"
    with contextlib.suppress(OSError):
        return any(os.readlink(link).endswith(name) for link in Path(f"/proc/{heartbeat.pid}/fd").iterdir())
    return False


def _is_traced(pid: int) -> bool:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("TracerPid:"):
                return line.split()[1] != "0"
    return False
