"""Requests to stop: a signal to a rank, or the file ``stop`` in the run folder."""

import contextlib
import signal
import time
from pathlib import Path
from types import FrameType

POLL_EVERY_S = 0.5
# torchrun passes a terminal's Ctrl-C on to ranks that the terminal has sent it to already.
_SAME_INTERRUPT_S = 0.5
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def stop_signals() -> tuple[signal.Signals, ...]:
    """Those that ask a run to stop; SIGHUP where nobody has this process ignore it, as ``nohup`` does."""
    ignores_hangup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return tuple(number for number in _SIGNALS if number != signal.SIGHUP or not ignores_hangup)


class StopRequest:
    """Whether this rank was asked to stop; ranks agree on it elsewhere."""

    def __init__(self) -> None:
        """Nobody has asked yet."""
        self._requested = False
        self._cause = ""
        self._next_poll_at = 0.0
        self._interrupted_at: float | None = None

    def install_handlers(self) -> None:
        """Let each of ``stop_signals`` ask this rank to stop; a second SIGINT interrupts it at once."""
        numbers = stop_signals()
        for number in numbers:
            signal.signal(number, self._on_signal)
        # The launcher holds them back from its agent, and so from us until now.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)

    def poll(self, stop_file: Path | None) -> bool:
        """Whether to stop; looks for the file, where one is given, at most every half second."""
        now = time.monotonic()
        if stop_file is not None and not self._requested and now >= self._next_poll_at:
            self._next_poll_at = now + POLL_EVERY_S
            # A file system that is away for a moment is no reason to end the run.
            with contextlib.suppress(OSError):
                self._requested = stop_file.exists()
        return self._requested

    def describe(self, stop_file: Path) -> str:
        """Who asked: a signal to this rank, or what the file says; empty where a person made an empty one."""
        if self._cause:
            return self._cause
        try:
            return stop_file.read_text().strip()
        except (OSError, UnicodeDecodeError):
            return ""

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self._requested = True
        self._cause = self._cause or f"signal {signal.Signals(number).name}"
        if number != signal.SIGINT:
            return
        now = time.monotonic()
        if self._interrupted_at is None:
            self._interrupted_at = now
        elif now - self._interrupted_at > _SAME_INTERRUPT_S:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            raise KeyboardInterrupt
