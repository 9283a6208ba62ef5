"""Seeds' scores as a table and as a plot."""

import math
from collections.abc import Sequence
from statistics import fmean, median
from typing import Any

from benchmarks.presentation.facts import facts
from benchmarks.presentation.plots import Bar, bars
from benchmarks.presentation.result_files import Rows
from benchmarks.quality.cases import CASES, DISTILLATION, TRANSFER
from benchmarks.quality.interval import mean_and_half_width
from benchmarks.quality.pruning import pruning_lines
from benchmarks.quality.quantized import quantized_lines

_TITLE = "How well the examples learn"


def markdown(rows: Rows, file: str, changes: Sequence[str] = ()) -> str:
    """The result as Markdown.

    Args:
        rows: what the raw file holds.
        file: name of the raw file.
        changes: lines that say what has changed since the last result.
    """
    lines = [*facts(rows[0], _TITLE), ""]
    found = _cases(rows)
    if found:
        lines += ["| | metric | seeds | mean, 95 % interval | least | beside | bar | a run, s |", "| --- " * 8 + "|"]
        lines += [_line(rows, name, values) for name, values in found.items()]
    pairs, triples = _rows_of(rows, TRANSFER), _rows_of(rows, DISTILLATION)
    if pairs:
        lines += ["", *_transfer(pairs)]
    if triples:
        lines += ["", *_distillation(triples)]
    pruned = pruning_lines(rows)
    lines += pruned
    quantized = quantized_lines(rows)
    lines += quantized
    if not found and not pairs and not triples and not pruned and not quantized:
        lines.append("Interrupted before anything can be said.")
    if changes:
        lines += ["", *changes]
    return "\n".join([*lines, "", f"Raw scores: `{file}`."]) + "\n"


def plot(rows: Rows) -> str:
    """Means and intervals of what is a share of 1, as SVG."""
    drawn = []
    for name, values in _cases(rows).items():
        if CASES[name].metric in ("accuracy", "r2"):
            mean, half = mean_and_half_width(values)
            # One run has no interval.
            half = half if math.isfinite(half) else 0.0
            drawn.append(Bar(f"{name}, {CASES[name].metric}", mean, mean - half, mean + half))
    return bars(drawn, "mean over seeds with its 95 % interval", 3)


def met_bar(name: str, values: Sequence[float], baseline: float | None) -> bool | None:
    """Whether the mean of a case reaches its bar; None where there is none."""
    case, mean = CASES[name], fmean(values)
    if case.at_least is not None:
        return mean >= case.at_least
    if case.points_below_baseline is not None and baseline is not None:
        return mean >= baseline - case.points_below_baseline
    if case.baseline == "unigram-entropy" and baseline is not None:
        return mean < baseline
    return None


def _cases(rows: Rows) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for row in rows:
        if row["kind"] == "run":
            found.setdefault(row["case"], []).append(row["value"])
    return found


def _line(rows: Rows, name: str, values: list[float]) -> str:
    case = CASES[name]
    mean, half = mean_and_half_width(values)
    baseline = next((row for row in rows if row["kind"] == "baseline" and row["case"] == name), None)
    beside = "" if baseline is None else f"{baseline['what']}: {baseline['value']:.4f}"
    met = met_bar(name, values, None if baseline is None else baseline["value"])
    outcome = "" if met is None else " (met)" if met else " (missed)"
    columns = (
        name,
        f"{case.metric}, {case.split}",
        len(values),
        f"{mean:.4f} +- {half:.4f}",
        f"{min(values):.4f}",
        beside,
        _bar(name) + outcome,
        _seconds(rows, name),
    )
    return f"| {' | '.join(map(str, columns))} |"


def _seconds(rows: Rows, name: str) -> str:
    """Median time of a run from its command to its end; empty where a result does not have it."""
    times_s = [row["wall_s"] for row in rows if row["kind"] == "run" and row["case"] == name and "wall_s" in row]
    return f"{median(times_s):.0f}" if times_s else ""


def _bar(name: str) -> str:
    case = CASES[name]
    if case.at_least is not None:
        return f"at least {case.at_least:g}"
    if case.points_below_baseline is not None:
        return f"within {100 * case.points_below_baseline:g} points"
    return "below it" if case.baseline == "unigram-entropy" else ""


def _rows_of(rows: Rows, kind: str) -> list[dict[str, Any]]:
    return [dict(row) for row in rows if row["kind"] == kind]


def _distillation(triples: list[dict[str, Any]]) -> list[str]:
    differences = [triple["distilled"] - triple["alone"] for triple in triples]
    mean, half = mean_and_half_width(differences)
    teacher, distilled, alone = (fmean(t[which] for t in triples) for which in ("teacher", "distilled", "alone"))
    return [
        f"Distillation, {len(triples)} pairs of equal seeds and steps, all of 300 labels: the student that learns from "
        f"a teacher ({teacher:.4f}) reaches an accuracy of {distilled:.4f}, alone {alone:.4f}; the difference is "
        f"{mean:+.4f} +- {half:.4f} (95 %).",
    ]


def _transfer(pairs: list[dict[str, Any]]) -> list[str]:
    differences = [pair["transferred"] - pair["scratch"] for pair in pairs]
    mean, half = mean_and_half_width(differences)
    scratch, transferred = (fmean(pair[which] for pair in pairs) for which in ("scratch", "transferred"))
    return [
        f"Transfer, {len(pairs)} pairs of equal seeds and steps: the classifier that begins with a masked language "
        f"model's weights reaches an accuracy of {transferred:.4f}, from scratch {scratch:.4f}; the difference is "
        f"{mean:+.4f} +- {half:.4f} (95 %).",
    ]
