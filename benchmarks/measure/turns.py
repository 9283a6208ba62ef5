"""Contestants that own their loop, each in a thread of its own, of which one at a time takes its steps."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

StepEdge = Callable[[], None]
"""Called by a contestant after each of its steps; returns when the next one is due."""


@dataclass(frozen=True)
class StepTime:
    """What a step took, as a mean over the steps of one turn.

    Attributes:
        wall_s: seconds from edge to edge.
        cpu_s: processor seconds of all of this process's threads meanwhile; they say what a step costs even where
            other programs run beside it.
    """

    wall_s: float
    cpu_s: float


class Watcher(Protocol):
    """Looks at a turn from inside the contestant's thread, within its time: such a turn does not count."""

    def begin(self) -> None:
        """The turn begins."""

    def edge(self) -> None:
        """A step has ended, also the last of the turn."""

    def end(self) -> None:
        """The turn has ended, and the device is done."""


class ContestOver(BaseException):
    """Ends a contestant's loop from inside ``StepEdge``; not an Exception, so that no library swallows it."""


class Turns:
    """One contestant's thread, and the clock of its steps.

    A turn is one step or several. A step lasts from one edge to the next, both read in the contestant's own thread once
    it is awake, so handing over is not measured. A library that owns its loop can be stepped in this way as well as a
    loop written by hand.
    """

    def __init__(self, run: Callable[[StepEdge], None], synchronize: Callable[[], None]) -> None:
        """Start the thread; it waits for its first turn.

        Args:
            run: the contestant's whole training, which calls its argument after every step.
            synchronize: waits until what a turn has launched is finished; within the turn's time.
        """
        self._run = run
        self._synchronize = synchronize
        self._go, self._back = threading.Lock(), threading.Lock()
        self._go.acquire()
        self._back.acquire()
        self._is_over = False
        self._num_steps = self._num_left = 1
        self._watcher: Watcher | None = None
        self._error: BaseException | None = None
        self._started_at = self._cpu_started_at = 0.0
        self._time = StepTime(0.0, 0.0)
        self._thread = threading.Thread(target=self._main, name="contestant", daemon=True)
        self._thread.start()

    def take(self, num_steps: int = 1, watcher: Watcher | None = None) -> StepTime:
        """Let the contestant take a turn; returns the mean time of its steps.

        Args:
            num_steps: steps of the turn.
            watcher: looks at this turn.

        Raises:
            BaseException: whatever ended the contestant's loop.
        """
        self._num_steps = self._num_left = num_steps
        self._watcher = watcher
        self._go.release()
        self._back.acquire()
        if self._error is not None:
            raise self._error
        return self._time

    def end(self) -> None:
        """End the contestant's loop and its thread."""
        self._is_over = True
        self._go.release()
        self._thread.join()

    def _main(self) -> None:
        try:
            self._begin()
            self._run(self._edge)
            self._error = RuntimeError("a contestant ended its training before the contest was over")
        except ContestOver:
            return
        except BaseException as error:  # noqa: BLE001 - the thread that gives turns must hear of whatever ends this one
            self._error = error
        self._back.release()

    def _begin(self) -> None:
        self._go.acquire()
        if self._is_over:
            raise ContestOver
        if self._watcher is not None:
            self._watcher.begin()
        self._cpu_started_at = time.process_time()
        self._started_at = time.perf_counter()

    def _edge(self) -> None:
        if self._watcher is not None:
            self._watcher.edge()
        self._num_left -= 1
        if self._num_left:
            return
        self._synchronize()
        wall_s = time.perf_counter() - self._started_at
        cpu_s = time.process_time() - self._cpu_started_at
        self._time = StepTime(wall_s / self._num_steps, cpu_s / self._num_steps)
        if self._watcher is not None:
            self._watcher.end()
        self._back.release()
        self._begin()
