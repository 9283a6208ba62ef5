"""``shardline bench report [FOLDER]``: the newest result of each benchmark in a folder, on one page.

``python -m benchmarks.report [runs/benchmarks]`` writes ``FOLDER/report.md`` from the tables and plots beside the raw
files, and says of each result that was measured before how much it has changed and whether that is more than noise.
"""

import argparse
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.checkpoint_table import blocking_times
from benchmarks.comparison import (
    RESULTS,
    Series,
    changes_markdown,
    compare,
    difference_of_setup,
    last_result,
    read_rows,
)
from benchmarks.overhead_table import REFERENCE, step_times
from benchmarks.startup import BARE, SHARDLINE
from sharding.errors import UserError, ends_with_a_sentence

_RAW = re.compile(r"(?P<name>[a-z]+)_(?P<machine>\d+x[a-z]+)_[\d_]+\.jsonl")
_HEADING = re.compile(r"^#", re.MULTILINE)
Rows = Sequence[Mapping[str, Any]]


@ends_with_a_sentence
def main(arguments: Sequence[str]) -> int:
    """Write the page and say where; returns the exit status."""
    parser = argparse.ArgumentParser(prog="shardline bench report")
    parser.add_argument("folder", nargs="?", type=Path, default=Path("runs/benchmarks"), metavar="FOLDER")
    folder = parser.parse_args(arguments).folder
    newest = newest_results(folder)
    if not newest:
        raise UserError(f"{folder} holds no results; measure something first: shardline bench all --quick, say.")
    page = folder / "report.md"
    page.write_text(render(newest))
    print(f"{len(newest)} results: {page}")
    return 0


def newest_results(folder: Path) -> list[Path]:
    """The newest raw file of each benchmark and kind of machine that has a table beside it, by name."""
    newest: dict[str, Path] = {}
    for raw in sorted(folder.glob("*.jsonl")):
        found = _RAW.fullmatch(raw.name)
        if found and raw.with_suffix(".md").exists():
            newest[f"{found['name']}_{found['machine']}"] = raw
    return [newest[kind] for kind in sorted(newest)]


def render(results: Sequence[Path]) -> str:
    """The page as Markdown.

    Args:
        results: raw files with their tables, and plots where there are some, beside them.
    """
    sections = ["# Benchmarks"]
    for raw in results:
        sections.append(_HEADING.sub("##", raw.with_suffix(".md").read_text().strip()))
        sections += [f"![{raw.stem}]({raw.stem}{ending})" for ending in (".svg", ".png") if _is_beside(raw, ending)]
        if changes := _changes(raw):
            sections.append("\n".join(changes))
    return "\n\n".join(sections) + "\n"


def overhead_series(rows: Rows) -> dict[str, Series]:
    """Each contestant's step times beside the plain loop's, by size."""
    found: dict[str, Series] = {}
    for size in dict.fromkeys(row["size"] for row in rows):
        times = step_times(rows, size)
        found |= {
            f"{size}: {name}": Series(t, times[REFERENCE]) for name, t in times.items() if name != REFERENCE and t
        }
    return found


def startup_series(rows: Rows) -> dict[str, Series]:
    """`shardline run` beside torchrun with a bare script."""
    rounds = [row["wall_s"] for row in rows if row["kind"] == "round"]
    return {SHARDLINE: Series([one[SHARDLINE] for one in rounds], [one[BARE] for one in rounds])}


def checkpoint_series(rows: Rows) -> dict[str, Series]:
    """Seconds that saves keep training waiting, and that loads take."""
    found = {f"blocks, {mode}": Series(blocking_times(rows, mode)) for mode in ("asynchronous", "in_place")}
    found["load"] = Series([row["seconds"] for row in rows if row["kind"] == "load"])
    return {name: series for name, series in found.items() if series.values}


# Those that are not here say so in their own tables.
_SERIES: dict[str, Callable[[Rows], dict[str, Series]]] = {
    "overhead": overhead_series,
    "startup": startup_series,
    "checkpoint": checkpoint_series,
}


def _changes(raw: Path) -> list[str]:
    series_of = _SERIES.get(raw.name.partition("_")[0])
    before = last_result(raw, [raw.parent, RESULTS]) if series_of is not None else None
    if series_of is None or before is None:
        return []
    rows, old_rows = read_rows(raw), read_rows(before)
    changes = compare(series_of(rows), series_of(old_rows))
    return changes_markdown(changes, before.name, difference_of_setup(rows[0], old_rows[0]))


def _is_beside(raw: Path, ending: str) -> bool:
    return raw.with_suffix(ending).exists()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
