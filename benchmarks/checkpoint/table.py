"""The table of ``shardline bench checkpoint``, from its raw rows."""

from collections.abc import Mapping, Sequence
from statistics import mean, median
from typing import Any

from benchmarks.measure.comparison import Series
from benchmarks.measure.protocol import quartiles
from benchmarks.presentation.facts import facts
from benchmarks.presentation.plots import Bar, bars
from trainer.metrics.paired_times import Ratio, ratio_of_medians

MAX_BLOCKING = 0.05
"""Target: what a save in the background keeps training waiting for, as a share of a step."""

MAX_SLOWDOWN = 1.03
"""Target: a step beside a write, over the others."""

_MODES = {"asynchronous": "in the background", "in_place": "in place"}
_MIB = 2**20
Row = Mapping[str, Any]


def blocking_times(rows: Sequence[Row], mode: str) -> list[float]:
    """Seconds that each save kept training waiting: for the copy, or the write, and for making it valid."""
    blocking_s: list[float] = []
    for row in _steps(rows, mode):
        if row["saves"]:
            blocking_s.append(row["blocking_s"])
        elif blocking_s:
            blocking_s[-1] += row["blocking_s"]
    return blocking_s


def step_times_beside_writes(rows: Sequence[Row]) -> tuple[list[float], list[float]]:
    """For each save, the mean time in seconds of the steps beside its write, and of the others up to the next save.

    What a step waited for a save is left out, and so are the steps that save: they also log.
    """
    beside: list[float] = []
    others: list[float] = []
    window: dict[bool, list[float]] = {}
    for row in [*_steps(rows, "asynchronous"), {"saves": True}]:
        if not row["saves"]:
            window.setdefault(row["beside_write"], []).append(row["wall_s"] - row["blocking_s"])
            continue
        if len(window) == 2:
            beside.append(mean(window[True]))
            others.append(mean(window[False]))
        window = {}
    return beside, others


def series(rows: Sequence[Row]) -> dict[str, Series]:
    """What a repeated result is compared by: seconds that saves keep training waiting, and that loads take."""
    found = {f"blocks, {mode}": Series(blocking_times(rows, mode)) for mode in _MODES}
    found["load"] = Series([row["seconds"] for row in rows if row["kind"] == "load"])
    return {name: one for name, one in found.items() if one.values}


def markdown(rows: Sequence[Row], file: str, changes: Sequence[str] = ()) -> str:
    """The result as Markdown.

    Args:
        rows: what the raw file holds.
        file: name of the raw file.
        changes: lines that say what has changed since the last result.
    """
    header = rows[0]
    lines = [*facts(header, "Saving and loading"), ""]
    lines += [
        f"{header['num_ranks']} ranks with {header['threads']} threads each. The configuration is in the raw file."
    ]
    lines += ["", *_saving(rows), "", *_verdict(rows), "", *_loading(rows)]
    if changes:
        lines += ["", *changes]
    return "\n".join([*lines, "", f"Raw times: `{file}`."]) + "\n"


def plot(rows: Sequence[Row]) -> str:
    """What a save keeps training waiting for, each way, as SVG."""
    found = []
    for mode, name in _MODES.items():
        if blocking_s := blocking_times(rows, mode):
            low, middle, high = (1e3 * value for value in quartiles(blocking_s))
            found.append(Bar(name, middle, low, high, f"{middle / 1e3 / _step_s(rows, mode):.1%} of a step"))
    return bars(found, "a save blocks, ms, median and quartiles", 1)


def _saving(rows: Sequence[Row]) -> list[str]:
    headings = ("saved", "saves", "MiB", "step, ms", "blocks, ms", "share of a step", "written in, ms", "MiB/s")
    lines = [_row(headings), _row(["---"] * len(headings))]
    for mode, name in _MODES.items():
        writes = _of(rows, "writes", mode)
        if not writes:
            continue
        num_bytes, written_s = writes[0]["num_bytes"], median(writes[0]["seconds"])
        step_s, blocking_s = _step_s(rows, mode), median(blocking_times(rows, mode))
        cells = (
            name,
            str(len(blocking_times(rows, mode))),
            f"{num_bytes / _MIB:.1f}",
            f"{step_s * 1e3:.1f}",
            f"{blocking_s * 1e3:.1f}",
            f"{blocking_s / step_s:.1%}",
            f"{written_s * 1e3:.1f}",
            f"{num_bytes / _MIB / written_s:,.0f}",
        )
        lines.append(_row(cells))
    return [*lines, "", "All are medians; a step is one that neither saves nor is beside a write."]


def _verdict(rows: Sequence[Row]) -> list[str]:
    if not _of(rows, "writes", "asynchronous"):
        return ["Interrupted before anything can be said."]
    share = median(blocking_times(rows, "asynchronous")) / _step_s(rows, "asynchronous")
    blocks = f"A save in the background blocks {share:.1%} of a step (target: below {MAX_BLOCKING:.0%})."
    beside, others = step_times_beside_writes(rows)
    if not beside and any(row["beside_write"] for row in _steps(rows, "asynchronous")):
        return [f"{blocks} Between saves all steps went on beside a write: there are none to compare; raise --every."]
    if not beside:
        return [f"{blocks} No step began beside a write that was still going on: writes are shorter than that."]
    ratio: Ratio = ratio_of_medians(beside, others)
    return [
        f"{blocks} Steps beside a write take {ratio.value:.3f} times as long as the others (95 % interval "
        f"{ratio.low:.3f} to {ratio.high:.3f}, {len(beside)} windows; target: below {MAX_SLOWDOWN:.2f})."
    ]


def _loading(rows: Sequence[Row]) -> list[str]:
    loads = _of(rows, "load", "load")
    if not loads:
        return []
    seconds, num_bytes = median(row["seconds"] for row in loads), loads[0]["num_bytes"]
    peaks = {row["when"]: row["peak_bytes"] for row in rows if row["kind"] == "memory"}
    described = ", ".join(f"{when} {num_bytes / _MIB:,.0f} MiB" for when, num_bytes in peaks.items())
    return [
        f"Loading: {num_bytes / _MIB:.1f} MiB in {seconds * 1e3:.1f} ms, {num_bytes / _MIB / seconds:,.0f} MiB/s, "
        f"verified, from the disk (median of {len(loads)}).",
        "",
        f"Peak resident memory of the largest rank: {described}. What is loaded is another process than what trained.",
    ]


def _steps(rows: Sequence[Row], mode: str) -> list[Row]:
    return _of(rows, "step", mode)


def _of(rows: Sequence[Row], kind: str, mode: str) -> list[Row]:
    return [row for row in rows if row["kind"] == kind and row["mode"] == mode]


def _step_s(rows: Sequence[Row], mode: str) -> float:
    unsaved = [row for row in _steps(rows, mode) if not row["saves"]]
    # Where writes take longer than what lies between two saves, there is no other.
    plain = [row for row in unsaved if not row["beside_write"]] or unsaved
    return median(row["wall_s"] - row["blocking_s"] for row in plain)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
