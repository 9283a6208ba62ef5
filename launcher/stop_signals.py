"""Signals that ask a run to stop, taken over from before its first rank until its last word."""

import signal
import time
from types import FrameType, TracebackType
from typing import Any

from trainer.runtime.stopping import stop_signals

# `timeout` and others send one signal to a process and once more to its group.
_SAME_SIGNAL_S = 0.5


class StopSignals:
    """Signals that reached the launcher: whether to stop, and whether to do so at once.

    At once means SIGINT after any other request, or SIGTERM twice. A batch system's SIGTERM that follows its own
    SIGUSR1 comes while the run is being saved, and is no sign of impatience. Nor is a second SIGHUP: a terminal that
    goes away sends it, and so does its shell.
    """

    def __init__(self) -> None:
        """None has come yet; they are received within a ``with`` block, in the main thread."""
        self.stop = False
        self.at_once = False
        self._last_at: dict[int, float] = {}
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        self._previous = {number: signal.signal(number, self.receive) for number in stop_signals()}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def receive(self, number: int, _frame: FrameType | None) -> None:
        """Take a signal."""
        now = time.monotonic()
        if now - self._last_at.get(number, -_SAME_SIGNAL_S) < _SAME_SIGNAL_S:
            return
        if (number == signal.SIGINT and self.stop) or (number == signal.SIGTERM and number in self._last_at):
            self.at_once = True
        self.stop = True
        self._last_at[number] = now
