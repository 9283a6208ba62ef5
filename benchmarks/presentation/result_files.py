"""The files of a result, ``DATE_MACHINE/NAME.jsonl`` with its table and plot beside it, and where they lie.

``2026-11-29_2xcpu/scaling.jsonl``, say, of 2 ranks on CPUs; the second of a day is ``scaling-2.jsonl``.
"""

import hashlib
import itertools
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from benchmarks.presentation.terminal import show
from trainer.config.earlier_spellings import overrides_with_present_spelling

RESULTS = Path(__file__).resolve().parents[1] / "results"
"""Results that are kept with the code; the last one of a kind is also looked for here."""

_FOLDER = re.compile(r"\d{4}-\d\d-\d\d_(?P<machine>\d+x[a-z]+)")
_REPETITION = re.compile(r"-\d+$")
_MEMORY_STEP_GIB = 4

Rows = Sequence[Mapping[str, Any]]


def raw_file(output: Path, kind: str, num_ranks: int, *, has_gpu: bool, makes_folder: bool = True) -> Path:
    """The path of a new raw file, ``DATE_MACHINE/KIND.jsonl``, which is made, so that no other benchmark takes it.

    Args:
        output: the folder of all results.
        kind: the benchmark's name.
        num_ranks: ranks that are measured.
        has_gpu: whether they compute on GPUs.
        makes_folder: whether the folder and the file are made.
    """
    folder = result_folder(output, num_ranks, has_gpu=has_gpu)
    if not makes_folder:
        return folder / f"{kind}.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    for path in numbered(folder / f"{kind}.jsonl"):
        try:
            path.touch(exist_ok=False)
        except FileExistsError:
            continue
        return path
    raise AssertionError("numbers do not end")


def result_folder(output: Path, num_ranks: int, *, has_gpu: bool) -> Path:
    """The folder of today's results, ``DATE_MACHINE``; the arguments are those of ``raw_file``."""
    return output / f"{time.strftime('%Y-%m-%d')}_{num_ranks}x{'gpu' if has_gpu else 'cpu'}"


def numbered(path: Path) -> Iterator[Path]:
    """A path, and what the second, the third of its name are called."""
    yield path
    for number in itertools.count(2):
        yield path.with_name(f"{path.stem}-{number}{path.suffix}")


def name_of(raw: Path) -> str:
    """What a page calls a result, ``DATE_MACHINE/NAME.jsonl``."""
    return f"{raw.parent.name}/{raw.name}"


def kind_of(raw: Path) -> str:
    """What results of one day and the next have in common: ``NAME``, and the machine where its folder says it."""
    folder = _FOLDER.fullmatch(raw.parent.name)
    return " ".join([_REPETITION.sub("", raw.stem), *([folder["machine"]] if folder else [])])


def results_in(output: Path) -> list[Path]:
    """The raw files in a folder of results, each day's in order of their names."""
    return sorted(path for path in output.glob("*/*.jsonl") if _FOLDER.fullmatch(path.parent.name))


def append_row(raw: Path, row: Mapping[str, Any]) -> None:
    """Add a row to a raw file, so that an interrupted benchmark keeps what it has."""
    with raw.open("a") as file:
        file.write(json.dumps(row) + "\n")


def read_rows(raw: Path) -> list[dict[str, Any]]:
    """The rows of a raw file; changes to a run that its header names are as they are spelt now."""
    rows: list[dict[str, Any]] = [json.loads(line) for line in raw.read_text().splitlines()]
    return [_with_present_spelling(row) if row.get("kind") == "header" else row for row in rows]


def last_result(raw: Path, folders: Sequence[Path]) -> Path | None:
    """The newest result of the same kind from before; None where there is none.

    That is one of the same benchmark on as many ranks, of the same size, with the same changes to it, and measured on a
    machine like this one: what another machine did says nothing of a change. Names of files decide nothing.

    Args:
        raw: a raw file, as ``raw_file`` names it.
        folders: where to look, each with a ``DATE_MACHINE`` in it.
    """
    folder = _FOLDER.fullmatch(raw.parent.name)
    own = read_header(raw)
    earlier: dict[Path, str] = {}
    for path in (
        path for output in folders for path in output.glob(f"*_{folder['machine'] if folder else ''}/*.jsonl")
    ):
        header = read_header(path)
        is_before = path.resolve() != raw.resolve() and header.get("time", "") < own.get("time", "")
        if is_before and _configuration(header) == _configuration(own) and _machine(header) == _machine(own):
            earlier[path] = header.get("time", "")
    return max(earlier, key=earlier.__getitem__, default=None)


def _configuration(header: Mapping[str, Any]) -> tuple[Any, ...]:
    """What makes two results comparable at all, as far as a header says: how it was measured, and what was trained."""
    setup = header.get("setup", {})
    benchmark = header.get("command", [])[:3]
    said = [setup.get(name) for name in ("protocol", "field", "size", "config", "micro_size", "sequence_length")]
    return (benchmark, *said, list(setup.get("overrides") or []))


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
        markdown: makes the table of rows, what a page calls the raw file, and ``changes``.
        plot: makes the SVG of rows.
        changes: lines that say what has changed since the last result.
    """
    rows = read_rows(raw)
    table = f"{markdown(rows, name_of(raw), changes)}{digest_line(raw)}"
    raw.with_suffix(".md").write_text(table)
    raw.with_suffix(".svg").write_text(plot(rows))
    log = "; what libraries said is in .log" if raw.with_suffix(".log").exists() else ""
    print()
    show(table)
    print(f"written to {raw}, .md and .svg{log}")


def digest_line(raw: Path) -> str:
    """The end of a table, by which a raw file that was changed afterwards is found out."""
    return f"Its SHA-256: `{hashlib.sha256(raw.read_bytes()).hexdigest()}`.\n"


def read_header(raw: Path) -> dict[str, Any]:
    """The first row of a raw file, as it is spelt now; empty where the file is."""
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
