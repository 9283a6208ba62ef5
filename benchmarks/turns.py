"""Contestants that own their loop, each in a thread of its own, of which one at a time takes one step."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

StepEdge = Callable[[], None]
"""Called by a contestant after each of its steps; returns when the next one is due."""


@dataclass(frozen=True)
class StepTime:
    """What one step took.

    Attributes:
        wall_s: seconds from edge to edge.
        cpu_s: processor seconds of all of this process's threads meanwhile; they say what a step costs even where
            other programs run beside it.
    """

    wall_s: float
    cpu_s: float


class ContestOver(BaseException):
    """Ends a contestant's loop from inside ``StepEdge``; not an Exception, so that no library swallows it."""


class Turns:
    """One contestant's thread, and the clock of its steps.

    A step lasts from one edge to the next, both read in the contestant's own thread once it is awake, so handing over
    is not measured. A library that owns its loop can be stepped in this way as well as a loop written by hand.
    """

    def __init__(self, run: Callable[[StepEdge], None], synchronize: Callable[[], None]) -> None:
        """Start the thread; it waits for its first turn.

        Args:
            run: the contestant's whole training, which calls its argument after every step.
            synchronize: waits until the device has finished what was launched.
        """
        self._run = run
        self._synchronize = synchronize
        self._go, self._back = threading.Lock(), threading.Lock()
        self._go.acquire()
        self._back.acquire()
        self._is_over = False
        self._error: BaseException | None = None
        self._started_at = self._cpu_started_at = 0.0
        self._time = StepTime(0.0, 0.0)
        self._thread = threading.Thread(target=self._main, name="contestant", daemon=True)
        self._thread.start()

    def take(self) -> StepTime:
        """Let the contestant take one step; returns its time.

        Raises:
            BaseException: whatever ended the contestant's loop.
        """
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
        self._cpu_started_at = time.process_time()
        self._started_at = time.perf_counter()

    def _edge(self) -> None:
        self._synchronize()
        wall_s = time.perf_counter() - self._started_at
        self._time = StepTime(wall_s, time.process_time() - self._cpu_started_at)
        self._back.release()
        self._begin()
