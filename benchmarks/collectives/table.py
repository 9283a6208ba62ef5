"""Tables and plot of ``shardline bench collectives``, from its raw rows."""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np

from benchmarks.measure.comparison import Series
from benchmarks.presentation.facts import facts
from benchmarks.presentation.plots import Panel, Point, line_panels

_GIGA = 1e9
_KIB = 2**10
_MIB = 2**20
# Links of more ranks than this do not fit a square of a page's width.
_MAX_SQUARE = 16
Row = Mapping[str, Any]


def bus_factor(collective: str, num_ranks: int) -> float:
    """Bus bandwidth over algorithm bandwidth: what each link carries at least, for each byte of the message.

    Source: NVIDIA nccl-tests, doc/PERFORMANCE.md: 2 (n - 1) / n for all-reduce, (n - 1) / n for reduce-scatter and
    all-gather, whose message is that of all ranks together.
    """
    return (2 if collective == "all-reduce" else 1) * (num_ranks - 1) / num_ranks


def slowest_s(rows: Sequence[Row]) -> dict[tuple[str, int], list[float]]:
    """Seconds of the slowest rank in each round, by collective and bytes of the message."""
    found: dict[tuple[str, int], list[float]] = {}
    for row in rows:
        if row["kind"] == "round":
            found.setdefault((row["collective"], row["num_bytes"]), []).append(max(row["seconds"]))
    return found


def series(rows: Sequence[Row]) -> dict[str, Series]:
    """Times by name of the row."""
    found = {f"{name} {_size(num_bytes)}": Series(times) for (name, num_bytes), times in slowest_s(rows).items()}
    for row in _links(rows):
        found[f"link {row['first']}-{row['second']} {_size(row['num_bytes'])}"] = Series(row["seconds"])
    return found


def markdown(rows: Sequence[Row], file: str, changes: Sequence[str] = ()) -> str:
    """The result as Markdown.

    Args:
        rows: what the raw file holds.
        file: name of the raw file.
        changes: lines about the result before this one.
    """
    header = rows[0]
    lines = [*facts(header, "Collectives and links"), "", _describe(header, rows), ""]
    lines += [*_collectives(header, rows), "", *_link_tables(header, rows), ""]
    if changes:
        lines += [*changes, ""]
    return "\n".join([*lines, f"Raw times: `{file}`."]) + "\n"


def plot(rows: Sequence[Row]) -> str:
    """Bus bandwidth by size of the message, as SVG."""
    num_ranks = rows[0]["num_ranks"]
    lines: dict[str, list[Point]] = {}
    for (name, num_bytes), times in slowest_s(rows).items():
        factor = bus_factor(name, num_ranks) * num_bytes / _GIGA
        low, middle, high = (factor / value for value in np.quantile(times, [0.75, 0.5, 0.25]))
        lines.setdefault(name, []).append(Point(num_bytes / _KIB, middle, low, high))
    return line_panels([Panel(f"{num_ranks} ranks", lines, [])], 1, "message, KiB", "bus GB/s")


def _describe(header: Row, rows: Sequence[Row]) -> str:
    num_rounds = len(next(iter(slowest_s(rows).values()), []))
    planned = "" if num_rounds == header["num_rounds"] else f" of {header['num_rounds']} planned: interrupted"
    return (
        f"{num_rounds} rounds{planned}, after {header['num_warmup']} of warm-up; {header['num_ranks']} ranks, "
        f"{header['ranks_per_node']} on a node, over {header['backend']}; fp32. A time is the slowest rank's, from the "
        "moment at which all are there; medians, and quartiles of the bus bandwidth."
    )


def _collectives(header: Row, rows: Sequence[Row]) -> list[str]:
    headings = ("collective", "message", "time, us", "algorithm GB/s", "bus GB/s", "quartiles")
    lines = [_row(headings), _row(["---"] * len(headings))]
    for (name, num_bytes), times in slowest_s(rows).items():
        rate = num_bytes / median(times) / _GIGA
        factor = bus_factor(name, header["num_ranks"])
        low, high = (factor * num_bytes / value / _GIGA for value in np.quantile(times, [0.75, 0.25]))
        cells = (
            name,
            _size(num_bytes),
            f"{median(times) * 1e6:,.0f}",
            f"{rate:.3g}",
            f"{factor * rate:.3g}",
            f"{low:.3g} to {high:.3g}",
        )
        lines.append(_row(cells))
    return lines


def _link_tables(header: Row, rows: Sequence[Row]) -> list[str]:
    links = _links(rows)
    if not links:
        return ["Interrupted before links were measured."]
    largest, smallest = max(row["num_bytes"] for row in links), min(row["num_bytes"] for row in links)
    rates = {
        (r["first"], r["second"]): r["num_bytes"] / median(r["seconds"]) / _GIGA
        for r in links
        if r["num_bytes"] == largest
    }
    delays = {(r["first"], r["second"]): median(r["seconds"]) * 1e6 for r in links if r["num_bytes"] == smallest}
    slowest = min(rates, key=lambda pair: rates[pair])
    typical = median(rates.values())
    lines = [
        f"One way between two ranks while the others wait, half of a message's time to and fro: {_size(largest)} at "
        f"{typical:.3g} GB/s, and {_size(smallest)} in {median(delays.values()):,.0f} us (medians of {len(rates)} "
        f"links); the slowest link is {slowest[0]}-{slowest[1]} with {rates[slowest]:.3g} GB/s, "
        f"{rates[slowest] / typical:.0%} of the median.",
        "",
    ]
    if header["num_ranks"] <= _MAX_SQUARE:
        return [*lines, *_square(rates, header["num_ranks"])]
    worst = sorted(rates, key=lambda pair: rates[pair])[:_MAX_SQUARE]
    lines += [_row(("link", "GB/s")), _row(("---", "---"))]
    return lines + [_row((f"{first}-{second}", f"{rates[first, second]:.3g}")) for first, second in worst]


def _square(rates: Mapping[tuple[int, int], float], num_ranks: int) -> list[str]:
    names = [str(rank) for rank in range(num_ranks)]
    lines = [_row(["GB/s", *names]), _row(["---"] * (num_ranks + 1))]
    for first in range(num_ranks):
        cells = [rates.get((min(first, second), max(first, second))) for second in range(num_ranks)]
        lines.append(_row([names[first], *("" if cell is None else f"{cell:.3g}" for cell in cells)]))
    return lines


def _links(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["kind"] == "link"]


def _size(num_bytes: int) -> str:
    return f"{num_bytes / _MIB:g} MiB" if num_bytes >= _MIB else f"{num_bytes / _KIB:g} KiB"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
