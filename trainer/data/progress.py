"""How far a long stage of work is: a bar on a terminal, plain lines elsewhere, nothing where nobody asked."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

_LINE_EVERY_S = 10.0


class StageProgress:
    """Shows one stage after another."""

    def __init__(self, enabled: bool) -> None:
        """Show progress, or keep quiet."""
        self._enabled = enabled
        self._bars: Progress | None = None
        if enabled and sys.stdout.isatty():
            columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
            self._bars = Progress(*columns, TimeElapsedColumn(), console=Console())

    def __enter__(self) -> Self:
        """Begin showing."""
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop showing."""
        if self._bars is not None:
            self._bars.stop()

    def note(self, sentence: str) -> None:
        """Tell a person something."""
        if self._bars is not None:
            self._bars.console.print(f"note: {sentence}", highlight=False, markup=False, soft_wrap=True)
        elif self._enabled:
            print(f"note: {sentence}", flush=True)

    @contextlib.contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        """Show one stage; yields a function that says how much more is done.

        Args:
            name: what is being done.
            total: how much there is to do, if known.
        """
        if self._bars is not None:
            task = self._bars.add_task(name, total=total)
            yield lambda amount: self._bars.advance(task, amount) if self._bars is not None else None
            return
        counter = _LineCounter(name, total, self._enabled)
        yield counter.advance
        counter.finish()


class _LineCounter:
    def __init__(self, name: str, total: int | None, enabled: bool) -> None:
        self._name = name
        self._total = f"/{total:,}" if total is not None else ""
        self._enabled = enabled
        self._done = 0
        self._started_at = self._said_at = time.monotonic()

    def advance(self, amount: int) -> None:
        self._done += amount
        if self._enabled and time.monotonic() - self._said_at > _LINE_EVERY_S:
            self._said_at = time.monotonic()
            print(f"{self._name}: {self._done:,}{self._total}", flush=True)

    def finish(self) -> None:
        if self._enabled:
            print(f"{self._name}: {self._done:,} done in {time.monotonic() - self._started_at:.1f} s", flush=True)
