"""A process: what tells it from others, which attempt of a run it is for, and how it ends. Imports no torch."""

import contextlib
import logging
import os
import socket
import sys
import time
from pathlib import Path
from typing import NoReturn

from sharding.ranks.process_stat import process_stat

LEASE_VARIABLE = "SHARDLINE_LEASE"

ATTEMPT_VARIABLE = "SHARDLINE_ATTEMPT"


def process_space() -> str:
    """What process ids refer to: this boot of this kernel, and the container. A host name does not tell that."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def process_start(pid: int) -> str | None:
    """Start time of a live process in clock ticks since boot, which tells it from a later one with the same id."""
    process = process_stat(pid)
    return str(process.start_ticks) if process is not None and process.is_alive else None


def process_age_s() -> float:
    """How long ago this process was started, in seconds."""
    process = process_stat(os.getpid())
    assert process is not None, "this process is there"
    return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - process.start_ticks / os.sysconf("SC_CLK_TCK"))


def end_process(exit_code: int) -> NoReturn:
    """Leave without the interpreter's own shutdown, once everything is written.

    After a failure the other ranks may be inside a collective, and shutting down could join them in waiting. After
    success, a background thread that was still winding down has been seen to abort the process, which a launcher would
    take for a failed run.
    """
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        # Whoever read our output may be gone.
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(exit_code)
