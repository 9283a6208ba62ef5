"""Tables and plots of pages, made of the tables of committed results.

A page says which, in a comment: ``columns FILE | COLUMN | COLUMN`` takes columns of one table as they are, ``overhead
FILE ...`` and ``scaling FILE | STRATEGY ...`` put several tables side by side, ``held FILE | STRATEGY ...`` has memory
where the latter has ratios, and ``plot FILE | STRATEGY ...`` draws those. Files are named from ``benchmarks/results``.
"""

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks.presentation.contestant_names import in_words
from benchmarks.presentation.plots import Bar, ratios
from benchmarks.presentation.result_files import RESULTS
from benchmarks.presentation.result_tables import FigureError, ResultTable, numbers_of, tables_of

_STRATEGIES = {"ddp": "DDP", "zero1": "ZeRO-1", "zero2": "ZeRO-2", "zero3": "ZeRO-3"}
_RATIO = "ratio to plain"
_STEP_MS = "step, ms"


def page_table(what: str, folder: Path) -> list[str]:
    """The lines of a table, or the one that shows a plot.

    Args:
        what: kind, files and columns, as the page says.
        folder: where the page lies.

    Raises:
        FigureError: there is no such kind, file, table or column.
    """
    kind, paths, columns = _parsed(what)
    if kind == "columns":
        return _columns(paths[0], columns)
    if kind == "overhead":
        return _overhead(paths)
    if kind == "scaling":
        return _side_by_side(_scaling(paths[0], columns))
    if kind == "held":
        return _side_by_side(_scaling(paths[0], columns, _held))
    if kind == "plot":
        return [f"![Steps beside the plain loop's]({Path(os.path.relpath(_plot_of(paths[0]), folder)).as_posix()})"]
    raise FigureError(f"there is no kind of table {kind!r}; there are columns, overhead, scaling, held and plot")


def page_plot(what: str) -> tuple[Path, str] | None:
    """A plot's file, and what it should hold, whose last line says which values it shows; None for a table."""
    kind, paths, columns = _parsed(what)
    if kind != "plot":
        return None
    groups = {
        name: [_bar(contestant, text) for contestant, text in ratios.items() if "(" in text]
        for name, ratios in _scaling(paths[0], columns).items()
    }
    said = hashlib.sha256(repr(groups).encode()).hexdigest()
    drawn = ratios(groups, "median step over the plain loop's, 95 % interval; less is better")
    return _plot_of(paths[0]), f"{drawn}<!-- values {said} -->\n"


def _parsed(what: str) -> tuple[str, list[Path], list[str]]:
    first, *columns = (part.strip() for part in what.split("|"))
    kind, *names = first.split()
    missing = [name for name in names if not (RESULTS / name).is_file()]
    if missing or not names:
        raise FigureError(f"there is no file {' '.join(missing)}")
    return kind, [RESULTS / name for name in names], columns


def _plot_of(path: Path) -> Path:
    return path.with_name(f"{path.stem}_ratios.svg")


def _bar(name: str, text: str) -> Bar:
    value, low, high = (float(number) for number in numbers_of(text))
    return Bar(name, value, low, high)


def _columns(path: Path, columns: Sequence[str]) -> list[str]:
    """Columns of the one table that has them all, each with its interval where one stands beside it."""
    found = [table for table in tables_of(path) if set(columns) <= set(table.columns)]
    if len(found) != 1:
        raise FigureError(f"{len(found)} tables have the columns {', '.join(columns)}")
    rows = [[in_words(found[0].cells(row, column)) for column in columns] for row in found[0].rows]
    return _markdown(columns, rows)


def _overhead(paths: Sequence[Path]) -> list[str]:
    """Contestants down, sizes across: the ratio of each to the plain loop, whose step is in milliseconds."""
    by_size: dict[str, Mapping[str, str]] = {}
    for table in (table for path in paths for table in tables_of(path) if _RATIO in table.columns):
        # Of a size that two files have, the first counts.
        by_size.setdefault(table.headings[-1], _ratios(table, "median step, ms"))
    return _side_by_side({f"`{size}`": ratios for size, ratios in by_size.items()})


def _scaling(
    path: Path, strategies: Sequence[str], cells: Callable[[ResultTable], dict[str, str]] | None = None
) -> dict[str, dict[str, str]]:
    """By strategy what each contestant has, at the most ranks of the file."""
    by_strategy: dict[str, dict[str, str]] = {}
    for table in tables_of(path):
        strategy = table.headings[-1]
        if _RATIO in table.columns and strategy in (strategies or _STRATEGIES) and strategy not in by_strategy:
            most = max(int(row[0].split()[0]) for row in table.rows)
            rows = tuple(row for row in table.rows if int(row[0].split()[0]) == most)
            at_most = ResultTable(table.headings, table.columns, rows)
            by_strategy[strategy] = cells(at_most) if cells else _ratios(at_most, _STEP_MS)
    return {_STRATEGIES.get(name, name): ratios for name, ratios in by_strategy.items()}


def _ratios(table: ResultTable, step: str) -> dict[str, str]:
    """What each contestant has; the plain loop, that of its step."""
    place = table.columns.index("contestant")
    found = {}
    for row in table.rows:
        ratio = table.cells(row, _RATIO)
        found[row[place]] = f"{table.cells(row, step)} ms" if ratio == "1" else ratio
    return found


def _held(table: ResultTable) -> dict[str, str]:
    """MiB that each contestant holds between steps, and at most in one."""
    place = table.columns.index("contestant")
    found = {row[place]: [table.cells(row, column) for column in ("holds, MiB", "at most, MiB")] for row in table.rows}
    return {name: " / ".join(cells) for name, cells in found.items() if all(cells)}


def _side_by_side(columns: Mapping[str, Mapping[str, str]]) -> list[str]:
    if not columns:
        raise FigureError("it has no such table")
    names = dict.fromkeys(name for ratios in columns.values() for name in ratios)
    rows = [[in_words(name), *(ratios.get(name, "") for ratios in columns.values())] for name in names]
    return _markdown(["", *columns], rows)


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (columns, ["---"] * len(columns), *rows)]
