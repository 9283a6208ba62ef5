"""What the time of runs was spent on, as bars and rows of a table."""

from collections.abc import Sequence
from dataclasses import dataclass

from trainer.metrics.goodput import Category, Goodput, title

_MINUTE_S = 60.0


@dataclass(frozen=True)
class GoodputRow:
    """One category.

    Attributes:
        category: its name, which gives it its colour.
        title: its name for people.
        cells: time and share in each run; a dash where there is no ledger.
    """

    category: str
    title: str
    cells: list[str]


@dataclass(frozen=True)
class GoodputBar:
    """One run's time as a bar.

    Attributes:
        sentence: what it shows.
        note: attempts and steps taken again.
        parts: category, description and share of each part, in order.
    """

    sentence: str
    note: str
    parts: list[tuple[str, str, float]]


def goodput_rows(runs: Sequence[Goodput | None]) -> list[GoodputRow]:
    """Categories on which at least one run has spent time, in order, and their sum; empty without ledgers."""
    known = [run for run in runs if run is not None]
    if not known:
        return []
    rows = [
        GoodputRow(name, title(name).capitalize(), [_cell(run, name) for run in runs])
        for name in Category
        if any(run.seconds[name] > 0 for run in known)
    ]
    sums = ["-" if run is None else _time(run.wall_s) for run in runs]
    return [*rows, GoodputRow("sum", "Wall time", sums)]


def goodput_bar(goodput: Goodput) -> GoodputBar:
    """The bar of one run."""
    parts = [
        (str(name), f"{title(name)} {goodput.shares[name]:.1%}", round(goodput.shares[name], 6))
        for name in Category
        if goodput.shares[name] > 0
    ]
    num_attempts, num_lost = len(goodput.attempts), goodput.num_lost_steps
    attempts = "1 attempt" if num_attempts == 1 else f"{num_attempts:,} attempts"
    lost = "no step was taken again" if not num_lost else f"{num_lost:,} steps were taken again or given up"
    return GoodputBar(goodput.sentence(), f"{attempts}; {lost}", parts)


def _cell(run: Goodput | None, category: Category) -> str:
    return "-" if run is None else f"{_time(run.seconds[category])} ({run.shares[category]:.1%})"


def _time(seconds: float) -> str:
    if seconds < _MINUTE_S:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
