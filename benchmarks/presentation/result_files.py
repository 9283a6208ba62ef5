"""The files of a result: raw rows as JSONL, and the table and the plot that are made of them."""

import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from benchmarks.presentation.terminal import show
from trainer.config.earlier_spellings import overrides_with_present_spelling

# KIND_RANKSxDEVICE, and then the time.
_NAME = re.compile(r"(.+_\d+x[a-z]+)_")
_MEMORY_STEP_GIB = 4

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
    """The rows of a raw file; changes to a run that its header names are as they are spelt now."""
    rows: list[dict[str, Any]] = [json.loads(line) for line in raw.read_text().splitlines()]
    return [_with_present_spelling(row) if row.get("kind") == "header" else row for row in rows]


def last_result(raw: Path, folders: Sequence[Path]) -> Path | None:
    """The newest file of the same kind from before; None where there is none.

    That is one with the same name but for the time, of the same size, with the same changes to it, and measured on a
    machine like this one: what another machine did says nothing of a change.

    Args:
        raw: a raw file, as ``raw_file`` names it.
        folders: where to look.
    """
    match = _NAME.match(raw.name)
    if match is None:
        return None
    own = _header(raw)
    earlier: dict[Path, str] = {}
    # A file that was kept may have lost the time of day in its name.
    for path in (path for folder in folders for path in folder.glob(f"{match[1]}_[0-9]*.jsonl")):
        header = _header(path)
        is_before = path.resolve() != raw.resolve() and header.get("time", "") < own.get("time", "")
        if is_before and _configuration(header) == _configuration(own) and _machine(header) == _machine(own):
            earlier[path] = header.get("time", "")
    return max(earlier, key=earlier.__getitem__, default=None)


def _configuration(header: Mapping[str, Any]) -> tuple[Any, ...]:
    """What makes two results of one benchmark comparable at all, as far as a header says."""
    setup = header.get("setup", {})
    return (setup.get("size"), setup.get("config"), list(setup.get("overrides") or []))


def _machine(header: Mapping[str, Any]) -> tuple[Any, ...]:
    """What tells machines apart: processor, cores, memory in GiB, and the models of its GPUs without their driver."""
    hardware = header.get("hardware", {})
    gpus = [gpu.partition(",")[0] for gpu in hardware.get("gpus", [])]
    # Kernels keep a little for themselves, each another amount.
    memory = round(hardware.get("memory_gib", 0.0) / _MEMORY_STEP_GIB)
    return (hardware.get("cpu"), hardware.get("usable_cores"), memory, gpus)


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
    print()
    show(table)
    print(f"written to {raw}, .md and .svg{log}")


def _header(raw: Path) -> dict[str, Any]:
    with raw.open() as file:
        line = file.readline()
    return _with_present_spelling(json.loads(line)) if line else {}


def _with_present_spelling(header: dict[str, Any]) -> dict[str, Any]:
    setup = header.get("setup")
    if not setup or not setup.get("overrides"):
        return header
    return header | {"setup": setup | {"overrides": overrides_with_present_spelling(setup["overrides"])}}


class WriteRow(Protocol):
    """Appends a row to the result."""

    def __call__(self, *, kind: str, **row: Any) -> None:
        """The row's kind, and what else it says."""
