"""Curves of a run: metrics.jsonl by column, thinned to what a browser can draw."""

import json
import math
from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MAX_POINTS = 3000
_NULL = math.nan


@dataclass
class Column:
    """One metric.

    Attributes:
        rows: which logged lines have it, from 0.
        values: its values there; NaN where the line says null.
    """

    rows: "array[int]" = field(default_factory=lambda: array("q"))
    values: "array[float]" = field(default_factory=lambda: array("d"))

    def finite(self) -> list[float]:
        """The values that are numbers."""
        return [value for value in self.values if not math.isnan(value)]


@dataclass
class Curves:
    """metrics.jsonl by column.

    Attributes:
        steps: step of each logged line.
        columns: metric to column.
        num_unreadable: lines that are no JSON object with a step, such as the last one of a killed process.
    """

    steps: "array[int]" = field(default_factory=lambda: array("q"))
    columns: dict[str, Column] = field(default_factory=dict)
    num_unreadable: int = 0

    def last(self, metric: str) -> tuple[int, float] | None:
        """Step and value of a metric's last number; None where there is none."""
        column = self.columns.get(metric, Column())
        pairs = zip(reversed(column.rows), reversed(column.values), strict=True)
        return next(((self.steps[row], value) for row, value in pairs if not math.isnan(value)), None)

    def points(self, metric: str) -> list[tuple[int, float]]:
        """Step and value of each of a metric's numbers."""
        column = self.columns.get(metric, Column())
        pairs = zip(column.rows, column.values, strict=True)
        return [(self.steps[row], value) for row, value in pairs if not math.isnan(value)]


@dataclass(frozen=True)
class Thinned:
    """Some of a curve's points.

    Attributes:
        kept: positions in the curve, ascending: all of them, or of each bucket the lowest and the highest value.
        means: middle position and mean of each bucket; None where nothing was left out.
    """

    kept: list[int]
    means: tuple[list[int], list[float | None]] | None = None


def read_curves(path: Path) -> Curves:
    """Read metrics.jsonl, which may still be growing or not be there yet."""
    curves = Curves()
    try:
        file = path.open(encoding="utf-8", errors="replace")
    except OSError:
        return curves
    with file:
        for line in file:
            values = _parse(line)
            if values is None:
                curves.num_unreadable += 1
                continue
            row = len(curves.steps)
            curves.steps.append(values.pop("step"))
            for name, value in values.items():
                number = _number(value)
                if number is None:
                    continue
                column = curves.columns.get(name)
                if column is None:
                    column = curves.columns[name] = Column()
                column.rows.append(row)
                column.values.append(number)
    return curves


def training_hours(curves: Curves) -> list[float | None]:
    """Hours of training at each logged line, from the mean step times; evaluation and saving are not in them."""
    column = curves.columns.get("throughput/step_time_s", Column())
    times = dict(zip(column.rows, column.values, strict=True))
    hours: list[float | None] = []
    total_s, last_step = 0.0, 0
    for row, step in enumerate(curves.steps):
        total_s += times.get(row, _NULL) * max(step - last_step, 0)
        last_step = step
        hours.append(None if math.isnan(total_s) else total_s / 3600)
    return hours


def thin(values: "array[float]", max_points: int = MAX_POINTS) -> Thinned:
    """Keep of each of equal buckets the lowest and the highest value, so that no spike is lost, and both ends."""
    count = len(values)
    if count <= max_points:
        return Thinned(list(range(count)))
    num_buckets = max_points // 2 - 1
    kept = {0, count - 1}
    middles: list[int] = []
    means: list[float | None] = []
    for bucket in range(num_buckets):
        start, stop = bucket * count // num_buckets, (bucket + 1) * count // num_buckets
        numbers = [(value, start + index) for index, value in enumerate(values[start:stop]) if not math.isnan(value)]
        middles.append((start + stop) // 2)
        if numbers:
            kept |= {min(numbers)[1], max(numbers)[1]}
            means.append(math.fsum(value for value, _ in numbers) / len(numbers))
        else:
            kept.add(start)
            means.append(None)
    return Thinned(sorted(kept), (middles, means))


def _parse(line: str) -> dict[str, Any] | None:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(values, dict) or type(values.get("step")) is not int or abs(values["step"]) >= 2**63:
        return None
    return values


def _number(value: Any) -> float | None:
    """A finite number as it is, NaN for null and what is not finite, and None for what is no number."""
    if type(value) is float:
        return value if math.isfinite(value) else _NULL
    if value is None:
        return _NULL
    # Larger integers than a double holds raise in its place.
    return float(value) if type(value) is int and abs(value) < 2**1000 else None
