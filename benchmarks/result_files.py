"""The files of a result: raw rows as JSONL, and the table and the plot that are made of them."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Rows = Sequence[Mapping[str, Any]]


def raw_file(output: Path, kind: str, num_ranks: int, *, has_gpu: bool, makes_folder: bool = True) -> Path:
    """The path of a new raw file, ``KIND_RANKSxDEVICE_DATE_TIME.jsonl``.

    Args:
        output: the folder.
        kind: the benchmark's name.
        num_ranks: ranks that are measured.
        has_gpu: whether they compute on GPUs.
        makes_folder: whether the folder is made, where it is not there.
    """
    if makes_folder:
        output.mkdir(parents=True, exist_ok=True)
    device = "gpu" if has_gpu else "cpu"
    return output / f"{kind}_{num_ranks}x{device}_{time.strftime('%Y%m%d_%H%M%S')}.jsonl"


def append_row(raw: Path, row: Mapping[str, Any]) -> None:
    """Add a row to a raw file, so that an interrupted benchmark keeps what it has."""
    with raw.open("a") as file:
        file.write(json.dumps(row) + "\n")


def read_rows(raw: Path) -> list[dict[str, Any]]:
    """The rows of a raw file."""
    return [json.loads(line) for line in raw.read_text().splitlines()]


def last_result(raw: Path, folders: Sequence[Path]) -> Path | None:
    """The newest file of the same kind, with the same name but for the time, from before; None where there is none.

    Args:
        raw: a raw file, as ``raw_file`` names it.
        folders: where to look.
    """
    kind = "_".join(raw.name.split("_")[:2])
    # A file that was kept may have lost the time of day in its name.
    times = {path: _header(path).get("time", "") for folder in folders for path in folder.glob(f"{kind}_*.jsonl")}
    own = _header(raw).get("time", "")
    earlier = [path for path, time in times.items() if path.resolve() != raw.resolve() and time < own]
    return max(earlier, key=times.__getitem__, default=None)


def write_report(
    raw: Path,
    markdown: Callable[[Rows, str, Sequence[str]], str],
    plot: Callable[[Rows], str],
    changes: Sequence[str],
) -> None:
    """Write table and plot beside a raw file, and print the table.

    Args:
        raw: the raw file.
        markdown: makes the table of rows, the raw file's name and ``changes``.
        plot: makes the SVG of rows.
        changes: lines that say what has changed since the last result.
    """
    rows = read_rows(raw)
    table = markdown(rows, raw.name, changes)
    raw.with_suffix(".md").write_text(table)
    raw.with_suffix(".svg").write_text(plot(rows))
    log = "; what libraries said is in .log" if raw.with_suffix(".log").exists() else ""
    print(f"\n{table}\nwritten to {raw}, .md and .svg{log}")


def _header(raw: Path) -> dict[str, Any]:
    with raw.open() as file:
        line = file.readline()
    header: dict[str, Any] = json.loads(line) if line else {}
    return header
