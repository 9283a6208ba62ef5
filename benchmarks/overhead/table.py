"""The table of ``shardline bench overhead``, from its raw rows."""

from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

from benchmarks.measure.comparison import Series
from benchmarks.measure.protocol import Standing, standings
from benchmarks.presentation.facts import facts
from benchmarks.presentation.plots import Bar, ratios

REFERENCE = "plain"
OURS = "shardline"
TARGETS = {"tiny": 1.10, "quickstart": 1.03}
"""Upper end of the interval of Shardline's ratio to the plain loop."""

_ORDER = (REFERENCE, OURS, "accelerate", "fabric", "transformers")


def step_times(rows: Iterable[Mapping[str, Any]], size: str, clock: str = "wall_s") -> dict[str, list[float]]:
    """Each contestant's measured step times in seconds, one per round: that of the slowest rank.

    Args:
        rows: what the raw file holds.
        size: which of its sizes.
        clock: ``wall_s``, or ``cpu_s`` for processor time.
    """
    rounds = [row for row in rows if row["size"] == size and row["kind"] == "round"]
    names = rounds[0][clock] if rounds else _ORDER
    return {name: [max(row[clock][name]) for row in rounds] for name in sorted(names, key=_place)}


def series(rows: Sequence[Mapping[str, Any]]) -> dict[str, Series]:
    """What a repeated result is compared by: each contestant's step times over the plain loop's, by size."""
    found: dict[str, Series] = {}
    for size in dict.fromkeys(row["size"] for row in rows):
        times = step_times(rows, size)
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
        num_pairs = len(times[REFERENCE])
        lines += [f"## {size}", "", _describe(header, num_pairs), ""]
        if num_pairs:
            found = standings(times, REFERENCE)
            cpu_s = {name: median(values) for name, values in step_times(rows, size, "cpu_s").items()}
            lines += [*_table(found, cpu_s, _loss_differences(rows, size)), "", _verdict(size, found), ""]
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


def _describe(header: Mapping[str, Any], num_pairs: int) -> str:
    config = header["config"]
    model, batch = config["model"]["config"], config["batch"]
    planned = "" if num_pairs == header["num_pairs"] else f" of {header['num_pairs']} planned: interrupted"
    return (
        f"{num_pairs} pairs{planned}, after {header['num_warmup']} rounds of warm-up; {header['num_ranks']} ranks with "
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
        "mean step, ms",
        "ratio of means",
        "median CPU time, ms",
        "loss differs by",
    )
    lines = [_row(headings), _row(["---"] * len(headings))]
    for row in found:
        ratio, interval = "1", ""
        if row.ratio is not None:
            ratio, interval = f"{row.ratio.value:.3f}", f"{row.ratio.low:.3f} to {row.ratio.high:.3f}"
        difference = loss_differences.get(row.name)
        cells = (
            row.name,
            f"{row.median_s * 1e3:.2f}",
            ratio,
            interval,
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
    """Largest relative difference from the plain loop's loss; at the end where the contest got there."""
    return {
        row["contestant"]: row["largest_difference"] for row in rows if row["size"] == size and row["kind"] == "losses"
    }


def _verdict(size: str, found: Sequence[Standing]) -> str:
    by_name = {row.name: row for row in found}
    ours = by_name[OURS].ratio
    assert ours is not None
    met = "met" if ours.high <= TARGETS[size] else "missed"
    slower = [row.name for row in found if row.name in _ORDER[2:] and row.median_s <= by_name[OURS].median_s]
    peers = f"not below {', '.join(slower)}" if slower else "below every peer"
    return (
        f"Target {met}: upper end {ours.high:.3f}, at most {TARGETS[size]:.2f} wanted. Shardline's median is {peers}."
    )
