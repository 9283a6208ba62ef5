"""What a rank is doing, and for how long: one place that every part of a rank tells.

Watchdog, ledger and drills listen to it; throughput and goodput follow from its times.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum


class Phase(StrEnum):
    """What a rank may be doing, in the order of a run."""

    START = "start"
    """Imports, configuration, waiting for the corpus."""

    JOIN = "join"
    """Joining the process group."""

    BUILD = "build"
    """Model, engine, trackers."""

    LOAD = "load"
    """Reading a checkpoint."""

    DATA = "data"
    """Waiting for micro-batches."""

    AGREE = "agree"
    """The all-reduce of target counts and stop flags: the first place where a late rank is waited for."""

    TRAIN = "train"
    """Forward, backward, clipping, optimizer step."""

    COMPARE = "compare"
    """Comparing the copies of parameters on all ranks."""

    LOG = "log"
    """Reducing and writing metrics."""

    EVALUATE = "evaluate"
    """Held-out batches."""

    SAVE = "save"
    """What saving a checkpoint keeps training waiting for."""

    WRITE = "write"
    """Writing a rank's part of a checkpoint; no phase of training, which goes on meanwhile."""

    FINISH = "finish"
    """Outcome, report, trackers."""


@dataclass(frozen=True, slots=True)
class PhaseState:
    """A rank's place in the run.

    Attributes:
        phase: what it is doing.
        step: the optimizer step that it works on, from 1; 0 before the first.
        since: when the phase began, on the phases' clock in seconds.
    """

    phase: Phase
    step: int
    since: float


# Is called with what ended and what begins.
Listener = Callable[[PhaseState, PhaseState], None]


class Phases:
    """One rank's present phase; telling it costs about a microsecond.

    ``now`` may be read from any thread. Listeners run in the thread that enters a phase, and must be quick.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """The rank starts now.

        Args:
            clock: seconds from a beginning of its own; whoever measures within a phase reads it too.
        """
        self.clock = clock
        self.now = PhaseState(Phase.START, 0, clock())
        self._spent_s = dict.fromkeys(Phase, 0.0)
        self._listeners: list[Listener] = []

    def spent_s(self) -> dict[Phase, float]:
        """Seconds in each phase since the start, the present one included; for the thread that enters phases."""
        return self._spent_s | {self.now.phase: self._spent_s[self.now.phase] + self.clock() - self.now.since}

    def listen(self, listener: Listener) -> None:
        """Call a listener at each change from here on, in the order in which they were added."""
        self._listeners.append(listener)

    def enter(self, phase: Phase, step: int | None = None) -> None:
        """One phase ends and another begins, of the same step unless one is given."""
        ended = self.now
        self.now = PhaseState(phase, ended.step if step is None else step, self.clock())
        self._spent_s[ended.phase] += self.now.since - ended.since
        for listener in self._listeners:
            listener(ended, self.now)

    @contextmanager
    def during(self, phase: Phase) -> Iterator[None]:
        """Be in a phase, and then in the one before it again."""
        before = self.now.phase
        self.enter(phase)
        yield
        # Not after an error: what failed in a phase is reported as having failed there.
        self.enter(before)
