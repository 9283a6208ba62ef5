"""The live line of a run on a terminal: as much of it as fits, the step, the bar, the loss and the time left first."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.progress_bar import ProgressBar
from rich.text import Text

_GAP = 2
_MIN_BAR, _MAX_BAR = 8, 40


@dataclass(frozen=True)
class Part:
    """A piece of the line.

    Attributes:
        text: what it says.
        rank: those of higher rank are left out first; of rank 0 none is.
    """

    text: str
    rank: int


@dataclass
class ProgressLine:
    """What is shown now; changed in place between two drawings.

    Attributes:
        total_steps: step at which the run is finished.
        step: finished steps.
        parts: what is shown behind the bar, in order.
    """

    total_steps: int
    step: int
    parts: Sequence[Part] = ()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draw it at the terminal's present width."""
        head = f"step {self.step}/{self.total_steps}"
        room = options.max_width - len(head)
        tail = "".join(" " * _GAP + part.text for part in fitting(self.parts, room - 1 - _MIN_BAR))
        bar = min(_MAX_BAR, room - 1 - len(tail))
        yield Text(head, end="")
        if bar >= _MIN_BAR:
            yield Text(" ", end="")
            yield ProgressBar(total=self.total_steps, completed=self.step, width=bar)
        # Where even that is too much, the end is cut, for a line that is wrapped cannot be drawn over.
        yield Text(tail[: max(0, room)], end="")


def fitting(parts: Sequence[Part], width: int) -> list[Part]:
    """Those parts that fit into a width, gaps before them included, the ones of highest rank left out first."""
    chosen = list(parts)
    while sum(_GAP + len(part.text) for part in chosen) > width:
        last = max(chosen, key=lambda part: part.rank, default=None)
        if last is None or last.rank == 0:
            break
        chosen.remove(last)
    return chosen
