"""What ``shardline bench throughput`` has found, from its raw rows: a table and a plot."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from benchmarks.measure.comparison import Series, ratio_of_independent
from benchmarks.measure.protocol import quartiles
from benchmarks.presentation.facts import facts
from benchmarks.presentation.plots import Bar, bars
from trainer.metrics.paired_times import Ratio

_GIB = 2**30
Row = Mapping[str, Any]


@dataclass(frozen=True)
class RungResult:
    """One rung as it was measured, over all passes.

    Attributes:
        name: of the rung.
        is_kept: whether the rungs above have the technique too.
        rates: tokens per second of each window, over all ranks.
        steps_s: time of each step in seconds, of the slowest rank.
        data_wait: share of the windows in which ranks waited for a batch.
        peak_bytes: of the rank with the most.
        flops_per_token: 6N + 12Lds.
        flops_per_token_causal: 6N + 6Lds.
        peak_flops: dense peak of one device in FLOP/s; None where it is not known.
        num_ranks: ranks.
    """

    name: str
    is_kept: bool
    rates: list[float]
    steps_s: list[float]
    data_wait: float
    peak_bytes: int
    flops_per_token: int
    flops_per_token_causal: int
    peak_flops: float | None
    num_ranks: int

    @property
    def tokens_per_s(self) -> float:
        """Median over windows."""
        return median(self.rates)

    def mfu(self, *, causal: bool) -> float | None:
        """Use of the devices' dense peak in one of the two conventions; None where the peak is not known."""
        if self.peak_flops is None:
            return None
        flops = self.flops_per_token_causal if causal else self.flops_per_token
        return self.tokens_per_s / self.num_ranks * flops / self.peak_flops


def read_rungs(rows: Sequence[Row]) -> list[RungResult]:
    """All rungs that have a window and did not fail, from bottom to top."""
    found = []
    failed = {row["row"] for row in rows if row["kind"] == "failed"}
    for name in dict.fromkeys(row["row"] for row in rows if row["kind"] == "rung" and row["row"] not in failed):
        own = [row for row in rows if row.get("row") == name]
        windows = [row for row in own if row["kind"] == "window"]
        if not windows:
            continue
        rung = next(row for row in own if row["kind"] == "rung")
        model = next(row for row in own if row["kind"] == "model")
        tokens = rung["config"]["batch"]["global_size"] * rung["config"]["data"]["sequence_length"]
        found.append(
            RungResult(
                name=name,
                is_kept=rung["is_kept"],
                rates=[tokens * len(window["steps_s"]) / window["wall_s"] for window in windows],
                steps_s=[step_s for window in windows for step_s in window["steps_s"]],
                data_wait=sum(w["data_wait_s"] for w in windows) / sum(w["wall_s"] for w in windows),
                peak_bytes=max((row["peak_bytes"] for row in own if row["kind"] == "memory"), default=0),
                flops_per_token=model["flops_per_token"],
                flops_per_token_causal=model["flops_per_token_causal"],
                peak_flops=model["peak_flops"],
                num_ranks=rows[0]["num_ranks"],
            )
        )
    return found


def gains(rungs: Sequence[RungResult]) -> dict[str, Ratio]:
    """By name, a rung's tokens per second over those of the highest kept rung below it; the lowest has none."""
    found: dict[str, Ratio] = {}
    below: RungResult | None = None
    for rung in rungs:
        if below is not None:
            found[rung.name] = ratio_of_independent(Series(rung.rates), Series(below.rates))
        if rung.is_kept:
            below = rung
    return found


def series(rows: Sequence[Row]) -> dict[str, Series]:
    """What a repeated result is compared by: tokens per second of each window."""
    return {rung.name: Series(rung.rates) for rung in read_rungs(rows)}


def markdown(rows: Sequence[Row], file: str, changes: Sequence[str] = ()) -> str:
    """The result as Markdown.

    Args:
        rows: what the raw file holds.
        file: name of the raw file.
        changes: lines that say what has changed since the last result.
    """
    header, rungs = rows[0], read_rungs(rows)
    lines = [*facts(header, "Throughput"), "", _describe(header), "", *_table(rungs), ""]
    lines += [
        "A name that begins with + stays on in the rows below it; the others are measured on top of these, alone."
    ]
    left_out = [row for row in rows if row["kind"] in ("skipped", "failed")]
    if left_out:
        lines += ["", *(f"- {row['row']}: {row['kind']}, {row['reason']}" for row in left_out)]
    if all(rung.peak_flops is None for rung in rungs):
        lines += ["", "The peak of this device is not known, so there is no MFU."]
    if changes:
        lines += ["", "## Since the last result", "", *changes]
    return "\n".join([*lines, "", f"Raw times: `{file}`."]) + "\n"


def plot(rows: Sequence[Row]) -> str:
    """Tokens per second of each rung as SVG, with quartiles over windows."""
    found = []
    for rung in read_rungs(rows):
        low, _, high = quartiles(rung.rates)
        mfu = rung.mfu(causal=False)
        found.append(Bar(rung.name, rung.tokens_per_s, low, high, "" if mfu is None else f"MFU {mfu:.1%}"))
    return bars(found, "tokens/s, median and quartiles over windows")


def _describe(header: Row) -> str:
    config = header["config"]
    return (
        f"{header['num_windows']} windows of {header['window_steps']} steps in each of {header['num_passes']} passes, "
        f"after {header['num_warmup']} steps of warm-up; {header['num_ranks']} ranks with {header['threads']} threads "
        f"each. {config['model']['architecture']} {header['size']}; {config['batch']['global_size']} sequences of "
        f"{config['data']['sequence_length']} tokens a step, {config['batch']['micro_size']} in a micro-batch; "
        f"strategy {config['parallel']['strategy']}. Every row's configuration is in the raw file."
    )


def _table(rungs: Sequence[RungResult]) -> list[str]:
    headings = (
        *("", "tokens/s", "quartiles", "per device", "over the row before", "95 % interval", "step p50, ms", "p95, ms"),
        *("MFU 6N+12Lds", "MFU 6N+6Lds", "peak GiB", "data wait"),
    )
    lines, ratios = [_row(headings), _row(["---"] * len(headings))], gains(rungs)
    for rung in rungs:
        low, _, high = quartiles(rung.rates)
        p50, p95 = np.quantile(rung.steps_s, [0.5, 0.95])
        ratio = ratios.get(rung.name)
        cells = (
            rung.name,
            f"{rung.tokens_per_s:,.0f}",
            f"{low:,.0f} to {high:,.0f}",
            f"{rung.tokens_per_s / rung.num_ranks:,.0f}",
            "" if ratio is None else f"{ratio.value:.3f}",
            "" if ratio is None else f"{ratio.low:.3f} to {ratio.high:.3f}",
            f"{p50 * 1e3:.1f}",
            f"{p95 * 1e3:.1f}",
            _percent(rung.mfu(causal=False)),
            _percent(rung.mfu(causal=True)),
            f"{rung.peak_bytes / _GIB:.2f}",
            f"{rung.data_wait:.2%}",
        )
        lines.append(_row(cells))
    return lines


def _percent(share: float | None) -> str:
    return "n/a" if share is None else f"{share:.1%}"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
