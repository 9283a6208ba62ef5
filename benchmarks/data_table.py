"""The table of ``shardline bench data``, from its raw rows."""

from collections.abc import Mapping, Sequence
from statistics import median, quantiles
from typing import Any

from benchmarks.overhead_table import facts
from benchmarks.plots import Bar, bars

WANTED_TOKENS_PER_S = 50e6
"""Target of the loader on one core."""

_MIB = 2**20


def markdown(rows: Sequence[Mapping[str, Any]], file: str) -> str:
    """The result as Markdown.

    Args:
        rows: what the raw file holds.
        file: name of the raw file.
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
            low, _, high = quantiles(row["tokens_per_s"], n=4, method="inclusive")
            cells = f"{median(row['tokens_per_s']) / 1e6:.0f} | {low / 1e6:.0f} to {high / 1e6:.0f}"
            lines.append(f"| {row['loader']} | {cells} |")
    lines += ["", "| threads of the tokenizer | million tokens/s |", "| --- | --- |"]
    lines += [f"| {r['num_threads']} | {r['tokens_per_s'] / 1e6:.2f} |" for r in rows if r["kind"] == "tokenizer"]
    first = next(row for row in rows if row["kind"] == "first batch")
    lines += [
        "",
        f"A corpus of {first['num_tokens']:.3g} tokens: the first shuffled batch after {first['seconds']:.2f} s in a "
        f"process that has imported everything, which adds {first['added_bytes'] / _MIB:,.0f} MiB to it.",
    ]
    return "\n".join([*lines, "", f"Raw figures: `{file}`."]) + "\n"


def plot(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rates of the loader, as SVG."""
    found = []
    for row in rows:
        if row["kind"] == "loader":
            low, middle, high = (value / 1e6 for value in quantiles(row["tokens_per_s"], n=4, method="inclusive"))
            found.append(Bar(row["loader"], middle, low, high))
    return bars(found, "million tokens/s of the loader on one core, median and quartiles")
