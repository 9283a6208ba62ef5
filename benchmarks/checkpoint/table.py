"""The table of ``shardline bench checkpoint``, from its raw rows."""

from collections.abc import Mapping, Sequence
from statistics import mean, median
from typing import Any

from benchmarks.measure.comparison import Series
from benchmarks.measure.protocol import quartiles
from benchmarks.measure.starts import RatioOfStarts, ratio_over_starts
from benchmarks.presentation.facts import facts
from benchmarks.presentation.plots import Bar, bars

MAX_BLOCKING = 0.05
"""Target: what a save in the background keeps training waiting for, as a share of a step."""

MAX_SLOWDOWN = 1.03
"""Target: a step beside a write, over the others."""

_MODES = {"none": "never", "asynchronous": "in the background", "in_place": "in place"}
_SAVING = ("asynchronous", "in_place")
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


def step_times_beside_writes(rows: Sequence[Row]) -> tuple[list[list[float]], list[list[float]]]:
    """For each turn, by start, the mean time in seconds of the steps beside its write, and of the same without saving.

    What a step waited for a save is left out, and so are the steps that save. The other time is that of the run that
    does not save, in the steps of the same numbers, which it took just before or after.
    """
    unsaved = {(row["start"], row["step"]): row["wall_s"] for row in _steps(rows, "none")}
    turns: dict[int, dict[int, list[tuple[float, float]]]] = {}
    for row in _steps(rows, "asynchronous"):
        place = row["start"], row["step"]
        if row["beside_write"] and not row["saves"] and place in unsaved:
            times = row["wall_s"] - row["blocking_s"], unsaved[place]
            turns.setdefault(row["start"], {}).setdefault(row["turn"], []).append(times)
    both = [[tuple(map(mean, zip(*steps, strict=True))) for steps in turns[start].values()] for start in turns]
    return [[pair[0] for pair in start] for start in both], [[pair[1] for pair in start] for start in both]


def turn_times(rows: Sequence[Row], mode: str) -> list[list[float]]:
    """Seconds of each whole turn, by start: so many steps, of which the first saves where the mode does."""
    turns: dict[int, dict[int, list[float]]] = {}
    for row in _steps(rows, mode):
        turns.setdefault(row["start"], {}).setdefault(row["turn"], []).append(row["wall_s"])
    num_steps = max((len(steps) for start in turns.values() for steps in start.values()), default=0)
    return [[sum(steps) for steps in start.values() if len(steps) == num_steps] for start in turns.values()]


def series(rows: Sequence[Row]) -> dict[str, Series]:
    """What a repeated result is compared by: seconds that saves keep training waiting, and that loads take."""
    found = {f"blocks, {mode}": Series(blocking_times(rows, mode)) for mode in _SAVING}
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
    for mode, name in ((mode, _MODES[mode]) for mode in _SAVING):
        if blocking_s := blocking_times(rows, mode):
            low, middle, high = (1e3 * value for value in quartiles(blocking_s))
            found.append(Bar(name, middle, low, high, f"{middle / 1e3 / _step_s(rows, mode):.1%} of a step"))
    return bars(found, "a save blocks, ms, median and quartiles", 1)


def _saving(rows: Sequence[Row]) -> list[str]:
    headings = (
        *("saved", "saves", "MiB", "step, ms", "blocks, ms", "share of a step", "written in, ms", "MiB/s"),
        *("a turn over one without saving", "95 % interval"),
    )
    lines = [_row(headings), _row(["---"] * len(headings))]
    for mode, name in _MODES.items():
        if not _steps(rows, mode):
            continue
        step_s, writes = _step_s(rows, mode), _of(rows, "writes", mode)
        cells = [name, "0", "", f"{step_s * 1e3:.1f}", "", "", "", ""]
        if writes and mode in _SAVING:
            num_bytes = writes[0]["num_bytes"]
            written_s = median(seconds for row in writes for seconds in row["seconds"])
            blocking_s = blocking_times(rows, mode)
            cells = [
                name,
                str(len(blocking_s)),
                f"{num_bytes / _MIB:.1f}",
                f"{step_s * 1e3:.1f}",
                f"{median(blocking_s) * 1e3:.1f}",
                f"{median(blocking_s) / step_s:.1%}",
                f"{written_s * 1e3:.1f}",
                f"{num_bytes / _MIB / written_s:,.0f}",
            ]
        lines.append(_row([*cells, *_turn_cells(rows, mode)]))
    return [
        *lines,
        "",
        "All are medians; a step is one that neither saves nor is beside a write. A turn is the steps from one save to "
        "the next; runs take turns, and ratios are over starts and turns.",
    ]


def _turn_cells(rows: Sequence[Row], mode: str) -> tuple[str, str]:
    ratio = turn_ratio(rows, mode)
    return ("1", "") if ratio is None else (f"{ratio.value:.3f}", f"{ratio.low:.3f} to {ratio.high:.3f}")


def turn_ratio(rows: Sequence[Row], mode: str) -> RatioOfStarts | None:
    """Turns that save over those of the run that does not; None for itself, or where there is nothing to compare."""
    above, below = turn_times(rows, mode), turn_times(rows, "none")
    pairs = [one for one in zip(above, below, strict=False) if all(one)]
    if mode == "none" or not pairs:
        return None
    # Of a start that was interrupted, turns that both have taken.
    whole = [tuple(side[: min(map(len, pair))] for side in pair) for pair in pairs]
    return ratio_over_starts([pair[0] for pair in whole], [pair[1] for pair in whole])


def _verdict(rows: Sequence[Row]) -> list[str]:
    if not _of(rows, "writes", "asynchronous"):
        return ["Interrupted before anything can be said."]
    share = median(blocking_times(rows, "asynchronous")) / _step_s(rows, "asynchronous")
    blocks = f"A save in the background blocks {share:.1%} of a step (target: below {MAX_BLOCKING:.0%})."
    beside, others = step_times_beside_writes(rows)
    if not beside:
        return [f"{blocks} No step began beside a write that was still going on: writes are shorter than that."]
    ratio = ratio_over_starts(beside, others)
    return [
        f"{blocks} Steps beside a write take {ratio.value:.3f} times as long as the same steps of a run that does not "
        f"save, in turns (95 % interval {ratio.low:.3f} to {ratio.high:.3f}, {sum(map(len, beside))} turns in "
        f"{len(beside)} starts; target: below {MAX_SLOWDOWN:.2f})."
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
