"""What quantisation has changed, for a person, for programs, and for a model card."""

from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from trainer.config.quantization import QuantizationMethod
from trainer.deploy.signature import Format, Quality
from trainer.metrics.paired_times import Ratio


@dataclass(frozen=True)
class Speed:
    """Times of one batch, before and after.

    Attributes:
        batch_size: its rows.
        before_s: median time, seconds.
        after_s: likewise.
        ratio: after over before.
        num_pairs: pairs of times.
    """

    batch_size: int
    before_s: float
    after_s: float
    ratio: Ratio
    num_pairs: int


@dataclass(frozen=True)
class Quantized:
    """What quantisation has changed.

    Attributes:
        method: how.
        format: of both folders.
        share: of the weights that are quantized.
        size_bytes: of the files that hold the model, before and after.
        speeds: by batch size.
        quality: metrics before, as ``trained``, and after, as ``exported``.
        source: where samples are from.
        num_threads: CPU threads that computed.
    """

    method: QuantizationMethod
    format: Format
    share: float
    size_bytes: tuple[int, int]
    speeds: tuple[Speed, ...]
    quality: Quality
    source: str
    num_threads: int


def quantized_values(quantized: Quantized) -> dict[str, Any]:
    """The same as JSON has it."""
    quality = quantized.quality
    return {
        "format": quantized.format,
        "method": quantized.method,
        "quantized_share": quantized.share,
        "size_bytes": dict(zip(("before", "after"), quantized.size_bytes, strict=True)),
        "speed": [asdict(speed) for speed in quantized.speeds],
        "metrics": {
            name: {"before": before, "after": quality.exported[name]} for name, before in quality.trained.items()
        },
        "metric": quality.metric,
        "max_abs_error": quality.max_abs_error,
        "samples": quality.num_samples,
        "data": quantized.source,
        "threads": quantized.num_threads,
    }


def table_rows(quantized: Quantized) -> list[tuple[str, str, str, str]]:
    """Lines of the table: what, before, after, and the change."""
    (before_bytes, after_bytes), quality = quantized.size_bytes, quantized.quality
    rows = [
        ("size, MB", f"{before_bytes / 1e6:.3f}", f"{after_bytes / 1e6:.3f}", f"x {after_bytes / before_bytes:.2f}")
    ]
    for speed in quantized.speeds:
        ratio = speed.ratio
        change = f"x {ratio.value:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"
        name = f"batch of {speed.batch_size}, ms"
        rows.append((name, f"{1e3 * speed.before_s:.3f}", f"{1e3 * speed.after_s:.3f}", change))
    for name, before in quality.trained.items():
        if name == quality.metric or not name.startswith("f1/"):
            after = quality.exported[name]
            difference = "" if before is None or after is None else f"{after - before:+.5f}"
            judged = " (judged)" if name == quality.metric else ""
            rows.append((f"{name}{judged}", _shown(before), _shown(after), difference))
    return rows


def summary(quantized: Quantized) -> str:
    """What the table is of, and what it has no line for."""
    quality = quantized.quality
    return (
        f"{quantized.method} of {100 * quantized.share:.1f} % of the weights; {quality.num_samples:,} samples of "
        f"{quantized.source}, whose logits differ by at most {_shown(quality.max_abs_error)}; times in turns, "
        f"{quantized.num_threads} threads, 95 % interval of the ratio"
    )


def print_quantized(quantized: Quantized, console: Console) -> None:
    """Show size, speed and quality before and after.

    Args:
        quantized: what was done.
        console: where to.
    """
    table = Table()
    for header in ("", "before", "after", "change"):
        table.add_column(header, justify="right" if header else "left")
    for row in table_rows(quantized):
        table.add_row(*row)
    console.print(table)
    console.print(summary(quantized), markup=False)


def card_lines(quantized: Quantized) -> list[str]:
    """The section of a model card, Markdown."""
    lines = ["## Quantisation", "", "| | before | after | change |", "| --- | --- | --- | --- |"]
    lines += [f"| {' | '.join(row)} |" for row in table_rows(quantized)]
    return [*lines, "", summary(quantized) + "."]


def _shown(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.5g}"
