"""What a person sees while a run trains: one live line on a terminal, plain lines elsewhere."""

import contextlib
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import TextIO

from rich.console import Console as RichConsole
from rich.live import Live

from trainer.runtime.durations import duration_text
from trainer.trackers.progress_line import Part, ProgressLine

_log = logging.getLogger("shardline")

_REFRESH_EVERY_S = 0.1


class _Screen(RichConsole):
    def on_broken_pipe(self) -> None:
        # Rich would end the process.
        raise BrokenPipeError


class Console:
    """Progress of one run, on rank 0. Everything it says also goes to the log."""

    def __init__(self, total_steps: int, stream: TextIO | None = None, *, unit: str = "tokens") -> None:
        """Show nothing yet; messages work at once.

        Args:
            total_steps: step at which the run is finished.
            stream: where to show it; standard output if not given.
            unit: what the rate counts.
        """
        self._total_steps = total_steps
        self._unit = unit
        self._rich = _Screen(file=stream, highlight=False, soft_wrap=True)
        self._live: Live | None = None
        self._line = ProgressLine(total_steps, 0)
        self._first_step = 0
        self._started_at = time.monotonic()
        self._refreshed_at = 0.0
        self._is_readable = True

    def start(self, step: int) -> None:
        """Begin to show progress after ``step`` finished steps."""
        self._first_step = self._line.step = step
        self._started_at = time.monotonic()
        if self._rich.is_terminal and step < self._total_steps:
            # Drawn by us at the end of a step: a thread of its own would compete with the step for the interpreter.
            self._live = live = Live(self._line, console=self._rich, auto_refresh=False)
            self._show(lambda: live.start(refresh=True))

    def advance(self, step: int) -> None:
        """A step is done."""
        self._line.step = step
        if self._live is not None and (
            time.monotonic() - self._refreshed_at >= _REFRESH_EVERY_S or step >= self._total_steps
        ):
            self._show(self._live.refresh)
            self._refreshed_at = time.monotonic()

    def log_metrics(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Show a step's metrics."""
        parts = self._parts(step, metrics)
        line = "  ".join([f"step {step}/{self._total_steps}", *(part.text for part in parts)])
        if self._live is not None:
            # It shows the step itself.
            self._line.parts = parts
            self.advance(step)
            _log.info(line)
        else:
            self.info(line)
        if any(name.startswith("eval/") for name in metrics):
            evaluation = "  ".join(
                f"{name.removeprefix('eval/')} {value:.4f}"
                for name, value in metrics.items()
                # Those of single classes are too many for a line.
                if name.startswith("eval/") and "/f1/" not in name and value is not None
            )
            self.info(f"step {step}  evaluation  {evaluation}")

    def info(self, text: str) -> None:
        """Show one line."""
        _log.info(text)
        self._print(text)

    def warning(self, text: str) -> None:
        """Show one line that should not be overlooked."""
        _log.warning(text)
        self._print(f"warning: {text}")

    def close(self) -> None:
        """Stop showing progress."""
        if self._live is not None:
            self._show(self._live.stop)
            self._live = None

    def _print(self, text: str) -> None:
        self._show(lambda: self._rich.print(text, markup=False, emoji=False))
        self._show(self._rich.file.flush)

    def _show(self, action: Callable[[], None]) -> None:
        if not self._is_readable:
            return
        try:
            action()
        except (OSError, ValueError):
            # Whoever read our output is gone; the log has it all, and training goes on.
            self._is_readable = False
            if self._rich.file is sys.stdout:
                _discard_output()

    def _parts(self, step: int, metrics: Mapping[str, float | None]) -> list[Part]:
        elapsed_s = time.monotonic() - self._started_at
        left_s = elapsed_s / max(step - self._first_step, 1) * (self._total_steps - step)
        parts = [
            Part(f"loss {_number(metrics.get('train/loss'), '.4f')}", 0),
            Part(f"lr {_number(metrics.get('train/learning_rate'), '.2e')}", 3),
            Part(f"grad {_number(metrics.get('train/grad_norm'), '.2f')}", 4),
            Part(f"{_number(metrics.get('throughput/tokens_per_s'), ',.0f')} {self._unit}/s", 2),
        ]
        if metrics.get("throughput/mfu") is not None:
            parts.append(Part(f"MFU {_number(metrics['throughput/mfu'], '.1%')}", 5))
        if metrics.get("train/skipped_steps"):
            parts.append(Part(f"skipped {_number(metrics['train/skipped_steps'], '.0f')}", 1))
        return [*parts, Part(f"left {duration_text(left_s)}", 0)]


def _discard_output() -> None:
    """Let standard output lead nowhere, so that flushing what it still holds does not fail at the end of the run."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _number(value: float | None, form: str) -> str:
    return "n/a" if value is None else format(value, form)
