"""Exported models with weights of fewer bits, beside what they were made of: quality over seeds, size, speed."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any, get_args

from benchmarks.presentation.result_files import Rows
from benchmarks.quality.interval import mean_and_half_width
from trainer.checkpoint.reader import open_checkpoint
from trainer.config.quantization import QuantizationMethod
from trainer.deploy.export import ExportOptions, export_run
from trainer.deploy.quantization_result import quantized_values
from trainer.deploy.quantize import quantize_folder
from trainer.evaluation.reference import reference_of
from trainer.evaluation.subject import Asked, find_subject

QUANTIZED_CASES = ("digits-mlp", "digits-cnn", "text")
"""Those whose runs are exported and quantized."""

_ALLOWED = 0.005
"""Of accuracy, which the cases are judged by."""


def measure_quantized(run: Path, split: str) -> list[dict[str, Any]]:
    """Export a run to ONNX, and quantize that by every method, whatever it costs.

    Args:
        run: folder of the run.
        split: where the models are compared.

    Returns:
        What ``shardline quantize --json`` says, for each method.
    """
    with tempfile.TemporaryDirectory(dir=run.parent) as folder:
        work = Path(folder)
        export_run(open_checkpoint(str(run), None), work / "onnx", ExportOptions(format="onnx"))
        asked = Asked(str(run), split=split)
        reference = reference_of(asked, find_subject(asked, 1, work))
        methods: tuple[QuantizationMethod, ...] = get_args(QuantizationMethod)
        return [
            quantized_values(quantize_folder(work / "onnx", work / method, method, reference, accept_loss=True))
            for method in methods
        ]


def quantized_lines(rows: Rows) -> list[str]:
    """The table of what was quantized, Markdown; none where nothing was."""
    found: dict[tuple[str, str], list[Any]] = {}
    for row in rows:
        if row["kind"] == "quantized":
            found.setdefault((row["case"], row["method"]), []).append(row)
    if not found:
        return []
    header = ["", "method", "metric", "seeds", "before", "after", "change, 95 % interval", "within 0.5 points"]
    header += ["size", "time, batch of 1", "time, batch of 32"]
    lines = ["", f"| {' | '.join(header)} |", "| --- " * len(header) + "|"]
    return lines + [_line(case, method, of_case) for (case, method), of_case in found.items()]


def _line(case: str, method: str, rows: Sequence[Any]) -> str:
    metric = "accuracy" if "accuracy" in rows[0]["metrics"] else rows[0]["metric"]
    before, after = ([row["metrics"][metric][which] for row in rows] for which in ("before", "after"))
    mean, half = mean_and_half_width([now - then for then, now in zip(before, after, strict=True)])
    size = median(row["size_bytes"]["after"] / row["size_bytes"]["before"] for row in rows)
    times = [
        median(speed["ratio"]["value"] for row in rows for speed in row["speed"] if speed["batch_size"] == batch)
        for batch in (1, 32)
    ]
    columns = (
        *(case, method, metric, len(rows), f"{fmean(before):.4f}", f"{fmean(after):.4f}"),
        f"{mean:+.4f} +- {half:.4f}",
        "met" if mean >= -_ALLOWED else "missed",
        *(f"x {ratio:.2f}" for ratio in (size, *times)),
    )
    return f"| {' | '.join(map(str, columns))} |"
