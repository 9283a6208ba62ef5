"""The table of ``shardline bench data``, from its raw rows."""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from benchmarks.measure.comparison import Series
from benchmarks.measure.protocol import quartiles
from benchmarks.presentation.facts import facts
from benchmarks.presentation.plots import Bar, bars
from benchmarks.presentation.result_files import Rows

WANTED_TOKENS_PER_S = 50e6
"""Target of the loader on one core."""

_MIB = 2**20


def series(rows: Rows) -> dict[str, Series]:
    """What a repeated result is compared by: rates of the loader and the tokenizer, and times to a first batch."""
    found = {row["loader"]: Series(row["tokens_per_s"]) for row in rows if row["kind"] == "loader"}
    found |= {
        f"tokenizer, {row['num_threads']} threads": Series(_rates(row)) for row in rows if row["kind"] == "tokenizer"
    }
    return found | {"first batch": Series([row["seconds"] for row in _first_batches(rows)])}


def markdown(rows: Rows, file: str, changes: Sequence[str] = ()) -> str:
    """The result as Markdown.

    Args:
        rows: what the raw file holds.
        file: name of the raw file.
        changes: lines that say what has changed since the last result.
    """
    header = rows[0]
    settings = header["setup"]
    lines = [*facts(header, "Data"), ""]
    lines += [
        f"Batches of {settings['batch_size']} sequences of {settings['sequence_length']} tokens from shards in a warm "
        f"page cache, on one core (wanted: {WANTED_TOKENS_PER_S / 1e6:g} million tokens/s).",
        "",
        "| loader | million tokens/s | quartiles |",
        "| --- | --- | --- |",
    ]
    for row in rows:
        if row["kind"] == "loader":
            low, middle, high = (value / 1e6 for value in quartiles(row["tokens_per_s"]))
            lines.append(f"| {row['loader']} | {middle:.0f} | {low:.0f} to {high:.0f} |")
    lines += ["", "| threads of the tokenizer | million tokens/s | quartiles |", "| --- | --- | --- |"]
    for row in rows:
        if row["kind"] == "tokenizer":
            low, middle, high = (value / 1e6 for value in quartiles(_rates(row)))
            lines.append(f"| {row['num_threads']} | {middle:.2f} | {low:.2f} to {high:.2f} |")
    if firsts := _first_batches(rows):
        low, middle, high = quartiles([row["seconds"] for row in firsts])
        lines += [
            "",
            f"A corpus of {firsts[0]['num_tokens']:.3g} tokens: the first shuffled batch after {middle:.2f} s "
            f"({low:.2f} to {high:.2f}) in a process that has imported everything, which adds "
            f"{median(row['added_bytes'] for row in firsts) / _MIB:,.0f} MiB to it.",
        ]
    if changes:
        lines += ["", *changes]
    return "\n".join([*lines, "", f"Raw figures: `{file}`."]) + "\n"


def plot(rows: Rows) -> str:
    """Rates of the loader, as SVG."""
    found = []
    for row in rows:
        if row["kind"] == "loader":
            low, middle, high = (value / 1e6 for value in quartiles(row["tokens_per_s"]))
            found.append(Bar(row["loader"], middle, low, high))
    return bars(found, "million tokens/s of the loader on one core, median and quartiles")


def _first_batches(rows: Rows) -> list[Mapping[str, Any]]:
    return [row for row in rows if row["kind"] == "first batch"]


def _rates(row: Mapping[str, Any]) -> list[float]:
    """Tokens/s of a tokenizer each time; results before November 29, 2026 have it once."""
    found: float | list[float] = row["tokens_per_s"]
    return found if isinstance(found, list) else [found]
