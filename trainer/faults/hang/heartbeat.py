"""Signs of life of every rank: ``logs/attempt-N/rank-R.heartbeat.json``. Imports no torch, compares no two clocks."""

import os
import resource
import threading
from pathlib import Path
from typing import Literal

from pydantic import Field

from sharding.strict_model import StrictRecord
from trainer.runtime.phases import Phase

# One write of a fixed length in place: no other file of the folder is touched, and a full disk does not matter.
_LENGTH_BYTES = 1024
# A process that did not come to run for this much longer than it asked to sleep was stopped, or is on a machine that
# is: neither it nor what it looks at can be judged for that time.
_TOLERATED_LAG_S = 2.0

State = Literal["running", "debugged", "dumped", "ended"]


class Heartbeat(StrictRecord):
    """What a rank last said of itself."""

    rank: int
    """Its number."""

    host: str
    """Its machine."""

    process_space: str
    """What its pid refers to, as in the lease."""

    pid: int
    """Its process."""

    main_thread: int
    """Identifier of its main thread, as in its stacks."""

    beat: int
    """How often it has said something: a rank whose count stands still does not run."""

    time: float
    """Its machine's time, in seconds since 1970; for people."""

    phase: Phase = Field(strict=False)
    """What it is doing."""

    step: int
    """Optimizer step that it works on, from 1; 0 before the first."""

    in_phase_s: float
    """For how long, in seconds; time in which the process was stopped is left out."""

    allowance_s: float
    """For how long at most this phase may last, in seconds."""

    peak_rss_gib: float
    """Highest resident memory so far, in GiB."""

    state: State = "running"
    """`debugged`: somebody looks at it with a debugger; `dumped`: its stacks are written, it is about to be ended."""


class HeartbeatFile:
    """A rank's own heartbeat."""

    def __init__(self, log_dir: Path, rank: int) -> None:
        """Create the file."""
        path = heartbeat_path(log_dir, rank)
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)

    def write(self, heartbeat: Heartbeat) -> None:
        """Say something.

        Raises:
            OSError: the file system is away.
        """
        os.pwrite(self._descriptor, heartbeat.model_dump_json().encode().ljust(_LENGTH_BYTES - 1) + b"\n", 0)


class RunningTime:
    """Time in which this process ran, on ``time.monotonic``'s clock; it stands still while the process does."""

    def __init__(self, now: float) -> None:
        """Start at a moment."""
        self._last = now
        self._gaps: list[tuple[float, float]] = []

    def tick(self, now: float, expected_s: float) -> None:
        """Call it each time after having asked to sleep for ``expected_s``."""
        gap_s = now - self._last - expected_s - _TOLERATED_LAG_S
        if gap_s > 0:
            self._gaps = [*self._gaps[-99:], (now, gap_s)]
        self._last = now

    def excuse(self, then: float, now: float) -> None:
        """Do not count the time between two moments."""
        self._gaps = [*self._gaps[-99:], (now, self.since(then, now))]

    def since(self, then: float, now: float) -> float:
        """Seconds from then to now in which the process ran."""
        return max(0.0, now - then - sum(gap_s for at, gap_s in self._gaps if at > then))


class Pulse:
    """Other ranks' heartbeats, seen from here: for how long each has stood still on our own clock."""

    def __init__(self, log_dir: Path, running: RunningTime) -> None:
        """Nothing was seen yet."""
        self._log_dir = log_dir
        self._running = running
        self._seen: dict[int, tuple[Heartbeat, float]] = {}

    def look(self, now: float) -> dict[int, tuple[Heartbeat, float]]:
        """Each rank's last heartbeat, and the seconds for which it has not changed since we first saw it."""
        for rank, heartbeat in read_heartbeats(self._log_dir).items():
            seen = self._seen.get(rank)
            if seen is None or (seen[0].pid, seen[0].beat) != (heartbeat.pid, heartbeat.beat):
                self._seen[rank] = (heartbeat, now)
        return {rank: (beat, self._running.since(at, now)) for rank, (beat, at) in sorted(self._seen.items())}


def heartbeat_path(log_dir: Path, rank: int) -> Path:
    """Where a rank's heartbeat is."""
    return log_dir / f"rank-{rank}.heartbeat.json"


def read_heartbeats(log_dir: Path) -> dict[int, Heartbeat]:
    """All ranks' last heartbeats, by rank; one that is just being written is left out."""
    found = [Heartbeat.read(path) for path in log_dir.glob("rank-*.heartbeat.json")]
    return {beat.rank: beat for beat in sorted(filter(None, found), key=lambda beat: beat.rank)}


def peak_rss_gib() -> float:
    """Highest resident memory of this process so far, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main_thread_id() -> int:
    """Identifier of this process's main thread."""
    return threading.main_thread().ident or 0
