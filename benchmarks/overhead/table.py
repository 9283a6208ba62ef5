"""The table of ``shardline bench overhead``, from its raw rows."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from statistics import median
from typing import Any

from benchmarks.measure.comparison import Series
from benchmarks.measure.protocol import Standing, standings
from benchmarks.measure.starts import RatioOfStarts, Starts, ratio_over_starts
from benchmarks.presentation.facts import facts
from benchmarks.presentation.plots import Bar, ratios

REFERENCE = "plain"
OURS = "shardline"
TARGETS = {"tiny": 1.10, "quickstart": 1.03}
"""Upper end of the interval of Shardline's ratio to the plain loop."""

_ORDER = (REFERENCE, OURS, "accelerate", "fabric", "transformers")


def step_times(rows: Iterable[Mapping[str, Any]], size: str, clock: str = "wall_s") -> dict[str, list[list[float]]]:
    """Each contestant's measured step times in seconds, start by start one per round: that of the slowest rank.

    A start that was interrupted counts only where none is whole.

    Args:
        rows: what the raw file holds.
        size: which of its sizes.
        clock: ``wall_s``, or ``cpu_s`` for processor time.
    """
    own = [row for row in rows if row["size"] == size]
    num_pairs = max((row["num_pairs"] for row in own if row["kind"] == "header"), default=0)
    starts: dict[int, list[Mapping[str, Any]]] = {}
    for row in own:
        if row["kind"] == "round":
            starts.setdefault(row.get("start", 0), []).append(row)
    counted = [rounds for rounds in starts.values() if len(rounds) >= num_pairs] or list(starts.values())
    names = counted[0][0][clock] if counted else _ORDER
    return {
        name: [[max(row[clock][name]) for row in rounds] for rounds in counted] for name in sorted(names, key=_place)
    }


def series(rows: Sequence[Mapping[str, Any]]) -> dict[str, Series]:
    """What a repeated result is compared by: each contestant's step times over the plain loop's, by size."""
    found: dict[str, Series] = {}
    for size in dict.fromkeys(row["size"] for row in rows):
        times = {name: list(chain.from_iterable(starts)) for name, starts in step_times(rows, size).items()}
        found |= {
            f"{size}: {name}": Series(t, times[REFERENCE]) for name, t in times.items() if name != REFERENCE and t
        }
    return found


def _place(name: str) -> int:
    """Where a contestant stands in the table; a control comes last."""
    return _ORDER.index(name) if name in _ORDER else len(_ORDER)


def markdown(rows: Sequence[Mapping[str, Any]], file: str, changes: Sequence[str] = ()) -> str:
    """The result as Markdown: facts, and one table per size.

    Args:
        rows: what the raw file holds.
        file: name of the raw file.
        changes: lines that say what has changed since the last result.
    """
    headers = {row["size"]: row for row in rows if row["kind"] == "header"}
    first = next(iter(headers.values()))
    lines = [*facts(first, "Overhead of a training step"), ""]
    for size, header in headers.items():
        times = step_times(rows, size)
        starts = times[REFERENCE]
        lines += [f"## {size}", "", _describe(header, [len(pairs) for pairs in starts]), ""]
        if starts:
            found = standings(times, REFERENCE)
            (ours,) = (row.ratio for row in found if row.name == OURS and row.ratio is not None)
            cpu_times = step_times(rows, size, "cpu_s")
            cpu_s = {name: median(chain.from_iterable(values)) for name, values in cpu_times.items()}
            lines += [*_table(found, cpu_s, _loss_differences(rows, size)), ""]
            lines += [_verdict(size, ours, times), ""]
    if changes:
        lines += [*changes, ""]
    return "\n".join([*lines, f"Raw times: `{file}`."]) + "\n"


def plot(rows: Sequence[Mapping[str, Any]]) -> str:
    """Every contestant's ratio to the plain loop at every size, as SVG."""
    groups = {}
    for size in dict.fromkeys(row["size"] for row in rows if row["kind"] == "round"):
        found = standings(step_times(rows, size), REFERENCE)
        groups[size] = [Bar(row.name, row.ratio.value, row.ratio.low, row.ratio.high) for row in found if row.ratio]
    return ratios(groups, "median step over the plain loop's, 95 % interval; less is better")


def _describe(header: Mapping[str, Any], num_pairs: Sequence[int]) -> str:
    """What was measured.

    Args:
        header: of the size.
        num_pairs: of each start that counts.
    """
    config = header["config"]
    model, batch = config["model"]["config"], config["batch"]
    num_planned = header.get("num_starts", 1)
    is_whole = len(num_pairs) == num_planned and min(num_pairs) == header["num_pairs"]
    planned = "" if is_whole else f" (of {num_planned} x {header['num_pairs']} planned: interrupted)"
    measured = f"{len(num_pairs)} {'start' if len(num_pairs) == 1 else 'starts'} of {min(num_pairs, default=0)} pairs"
    return (
        f"{measured}{planned}, after {header['num_warmup']} rounds of warm-up; {header['num_ranks']} ranks with "
        f"{header['threads']} threads each. {config['model']['architecture']}, {model['num_hidden_layers']} blocks of "
        f"width {model['hidden_size']}; {batch['global_size']} sequences of {config['data']['sequence_length']} tokens "
        f"a step, {batch['micro_size']} in a micro-batch; strategy {config['parallel']['strategy']}, precision "
        f"{config['precision']['compute']}. The whole configuration is in the raw file."
    )


def _table(found: Sequence[Standing], cpu_s: Mapping[str, float], loss_differences: Mapping[str, float]) -> list[str]:
    headings = (
        "contestant",
        "median step, ms",
        "ratio to plain",
        "95 % interval",
        "spread",
        "mean step, ms",
        "ratio of means",
        "median CPU time, ms",
        "loss differs by",
    )
    lines = [_row(headings), _row(["---"] * len(headings))]
    for row in found:
        ratio, interval, spread = "1", "", ""
        if row.ratio is not None:
            ratio, interval = f"{row.ratio.value:.3f}", f"{row.ratio.low:.3f} to {row.ratio.high:.3f}"
            spread = f"{row.ratio.spread:.1%}" if len(row.ratio.by_start) > 1 else ""
        difference = loss_differences.get(row.name)
        cells = (
            row.name,
            f"{row.median_s * 1e3:.2f}",
            ratio,
            interval,
            spread,
            f"{row.mean_s * 1e3:.2f}",
            f"{row.mean_ratio:.3f}",
            f"{cpu_s[row.name] * 1e3:.2f}",
            "n/a" if difference is None else f"{difference:.0e}",
        )
        lines.append(_row(cells))
    return lines


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _loss_differences(rows: Iterable[Mapping[str, Any]], size: str) -> dict[str, float]:
    """The largest relative difference from the plain loop's loss, of any start."""
    found: dict[str, float] = {}
    for row in rows:
        if row["size"] == size and row["kind"] == "losses":
            found[row["contestant"]] = max(row["largest_difference"], found.get(row["contestant"], 0.0))
    return found


def _verdict(size: str, ours: RatioOfStarts, times: Mapping[str, Starts]) -> str:
    """Whether the target is met, and beside whom Shardline is faster.

    Args:
        size: the contest's.
        ours: Shardline's ratio to the plain loop.
        times: see ``step_times``.
    """
    target = "met" if ours.high <= TARGETS[size] else "missed"
    said = f"Target {target}: upper end {ours.high:.3f}, at most {TARGETS[size]:.2f} wanted."
    if len(ours.by_start) == 1:
        return f"{said} One start alone does not say who is faster."
    peers = {name: ratio_over_starts(times[OURS], times[name]) for name in times if name in _ORDER[2:]}
    for verdict, word in (("faster", "than"), ("not told apart", "from"), ("slower", "than")):
        beside = [f"{name} ({ratio.value:.3f})" for name, ratio in peers.items() if ratio.verdict == verdict]
        said += f" Shardline is {verdict} {word} {', '.join(beside)}." if beside else ""
    return said
