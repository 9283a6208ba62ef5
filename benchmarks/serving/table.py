"""Servers under load as a table and as a plot."""

from collections.abc import Sequence
from statistics import median
from typing import Any

from benchmarks.presentation.contestant_names import in_words
from benchmarks.presentation.facts import facts
from benchmarks.presentation.plots import Bar, bars
from benchmarks.presentation.result_files import Rows

SHARDLINE, LITSERVE, BARE = "shardline", "litserve", "fastapi"
_TITLE = "Serving a classifier"
_COLUMNS = (
    *("clients", "server", "requests/s", "p50, ms", "p99, ms", "wrong", "lost", "503"),
    *("processor time of a request, ms", "after SIGTERM: right", "after SIGTERM: lost", "ended after, s", "status"),
)


def markdown(rows: Rows, file: str, changes: Sequence[str] = ()) -> str:
    """The result as Markdown.

    Args:
        rows: what the raw file holds.
        file: name of the raw file.
        changes: lines that say what has changed since the last result.
    """
    header = rows[0]
    lines = [*facts(header, _TITLE), ""]
    groups = _groups(rows)
    if not groups:
        return "\n".join([*lines, "Interrupted before anything can be said."]) + "\n"
    setup = header["setup"]
    lines += [
        f"{setup['duration_s']:g} s each, servers and clients on the same cores; {setup['slow']} slow clients beside "
        "the others. Medians over turns; what is wrong or lost is summed.",
        "",
        f"| {' | '.join(_COLUMNS)} |",
        "| --- " * len(_COLUMNS) + "|",
    ]
    for (connections, server), turns in groups.items():
        lines.append(f"| {' | '.join(map(str, _line(connections, server, turns)))} |")
    lines += ["", *_of_slow_clients(groups)]
    left = sorted({server for (_, server), turns in groups.items() if any(turn["listens_after"] for turn in turns)})
    if left:
        lines += ["", f"After their end, something still listened: {', '.join(left)}."]
    if changes:
        lines += ["", *changes]
    return "\n".join([*lines, "", f"Raw counts: `{file}`."]) + "\n"


def plot(rows: Rows) -> str:
    """Requests a second, as SVG."""
    found = []
    for (connections, server), turns in _groups(rows).items():
        rates = [_rate(turn) for turn in turns]
        found.append(Bar(f"{in_words(server)}, {connections} clients", median(rates), min(rates), max(rates)))
    return bars(found, "requests/s that were answered right; the line goes from the least turn to the best")


def _groups(rows: Rows) -> dict[tuple[int, str], list[dict[str, Any]]]:
    groups: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for row in rows:
        if row["kind"] == "turn":
            groups.setdefault((row["connections"], row["server"]), []).append(dict(row))
    order = (SHARDLINE, LITSERVE, BARE)
    return dict(sorted(groups.items(), key=lambda item: (item[0][0], order.index(item[0][1]))))


def _rate(turn: dict[str, Any]) -> float:
    return float(turn["before"]["num_right"] / turn["wall_s"])


def _line(connections: int, server: str, turns: list[dict[str, Any]]) -> list[Any]:
    def total(when: str, name: str) -> int:
        return sum(turn[when][name] for turn in turns)

    def milliseconds(name: str) -> str:
        values = [turn["before"][name] for turn in turns if turn["before"][name] is not None]
        return f"{1000 * median(values):.1f}" if values else ""

    statuses = {turn["exit_code"] for turn in turns}
    return [
        *(connections, server, f"{median(map(_rate, turns)):,.0f}", milliseconds("p50_s"), milliseconds("p99_s")),
        *(total("before", "num_wrong"), total("before", "num_lost"), total("before", "num_busy")),
        f"{1000 * median(turn['cpu_s'] / max(turn['before']['num_right'], 1) for turn in turns):.2f}",
        *(total("after", "num_right"), total("after", "num_lost") + total("after", "num_wrong")),
        f"{median(turn['end_s'] for turn in turns):.1f}",
        " ".join("none" if status is None else str(status) for status in sorted(statuses, key=str)),
    ]


def _of_slow_clients(groups: dict[tuple[int, str], list[dict[str, Any]]]) -> list[str]:
    lines = ["Slow clients, one byte in 50 ms:"]
    for (connections, server), turns in groups.items():
        counts = {
            name: sum(turn["slow"][f"num_{name}"] for turn in turns) for name in ("right", "busy", "lost", "wrong")
        }
        lines.append(
            f"- {server} beside {connections}: {counts['right']} answered right, {counts['wrong']} wrong, "
            f"{counts['busy']} told that they were too slow, {counts['lost']} cut off without an answer."
        )
    return lines
