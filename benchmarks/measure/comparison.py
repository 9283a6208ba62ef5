"""A result beside the one before it: how much every row has changed, and whether that is more than noise."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.presentation.result_files import RESULTS, Rows, last_result, name_of, read_rows
from trainer.metrics.paired_times import CONFIDENCE, Ratio

_LEAST_CHANGE = 0.0005
_NUM_RESAMPLES = 10_000
# Rows of resamples at a time: what is indexed stays within some ten megabytes.
_CHUNK = 500


@dataclass(frozen=True)
class Series:
    """What one row of a result is the median of.

    Attributes:
        values: measured values in their order, in any unit.
        reference: what each value is paired with and divided by, such as the plain loop's time in the same round; None
            where values stand for themselves.
    """

    values: Sequence[float]
    reference: Sequence[float] | None = None


@dataclass(frozen=True)
class Change:
    """How one row has changed.

    Attributes:
        name: of the row.
        before: its median, or ratio of medians, in the earlier result.
        now: the same in this one.
        ratio: now over before.
    """

    name: str
    before: float
    now: float
    ratio: Ratio

    @property
    def is_more_than_noise(self) -> bool:
        """Whether the interval of the ratio leaves out 1, by what can be seen of it: bytes repeat almost exactly."""
        return not self.ratio.low - _LEAST_CHANGE <= 1.0 <= self.ratio.high + _LEAST_CHANGE


def changes_since_last(raw: Path, series_of: Callable[[Rows], Mapping[str, Series]]) -> list[str]:
    """Lines that say what has changed since the last result of the same kind; none where this is the first.

    It is looked for among the results beside this one and among the results that are kept with the code.

    Args:
        raw: this result's raw file.
        series_of: what rows of a raw file are compared by, by name.
    """
    before = last_result(raw, [raw.parent.parent, RESULTS])
    if before is None:
        return []
    rows, old_rows = read_rows(raw), read_rows(before)
    changes = compare(series_of(rows), series_of(old_rows))
    return changes_markdown(changes, name_of(before), difference_of_setup(rows[0], old_rows[0]))


def compare(now: Mapping[str, Series], before: Mapping[str, Series]) -> list[Change]:
    """The change of every row of which both results have two values or more, in the order of the new one.

    One value says nothing of noise.

    Args:
        now: rows by name.
        before: the earlier result's.
    """
    changes = []
    for name, series in now.items():
        if name in before and min(len(series.values), len(before[name].values)) > 1:
            ratio = ratio_of_independent(series, before[name])
            changes.append(Change(name, _median(before[name]), _median(series), ratio))
    return changes


def ratio_of_independent(numerator: Series, denominator: Series, seed: int = 0) -> Ratio:
    """Ratio of the medians of two series that were not measured in turns, with a bootstrap interval.

    Either side is resampled by itself, in blocks of neighbours that begin anywhere and go round at the end, since
    values that follow one another are alike where a machine is busy for a while (Politis and Romano, "A circular
    block-resampling procedure for stationary data", 1992). Blocks have n^(1/3) values, rounded up.

    What differs between two starts of a program, such as where its memory lies or who else uses the machine, is not in
    either series, so an interval without 1 says that the results differ, and not why.

    Args:
        numerator: one side.
        denominator: the other.
        seed: of the resamples.
    """
    generator = np.random.default_rng(seed)
    above, below = (_resampled_medians(series, generator) for series in (numerator, denominator))
    tail = (1.0 - CONFIDENCE) / 2
    low, high = np.quantile(above / below, [tail, 1.0 - tail])
    return Ratio(_median(numerator) / _median(denominator), float(low), float(high))


def difference_of_setup(now: Mapping[str, Any], before: Mapping[str, Any]) -> str:
    """What was different when the earlier result was measured, as a part of a sentence; empty where nothing was.

    Compared are the hardware, versions, and what a benchmark puts under ``setup``.

    Args:
        now: header of this result.
        before: header of the earlier one.
    """
    found = []
    for key in ("cpu", "usable_cores", "gpus"):
        old, new = before["hardware"].get(key), now["hardware"].get(key)
        if old != new:
            found.append(f"hardware {key} {old}, now {new}")
    for section in ("packages", "setup"):
        if section in now and section not in before:
            found.append(f"its {section} is not recorded")
            continue
        for name, new in now.get(section, {}).items():
            old = before[section].get(name)
            if old != new:
                found.append(f"{name} {old}, now {new}")
    return "; ".join(found)


def changes_markdown(changes: Sequence[Change], before_file: str, difference: str) -> list[str]:
    """Lines that say what has changed since the earlier result; none where that has measured nothing alike.

    Args:
        changes: of all rows that both have.
        before_file: what a page calls the earlier raw file.
        difference: see ``difference_of_setup``.
    """
    if not changes:
        return []
    real = [change for change in changes if change.is_more_than_noise]
    setup = f" Measured under other conditions: {difference}." if difference else ""
    lines = [
        f"Since `{before_file}`: {len(real)} of {len(changes)} rows differ by more than noise, that is, the 95 % "
        f"interval of the ratio leaves out 1.{setup}"
    ]
    if real:
        lines += ["", "| row | before | now | now / before | 95 % interval |", "| --- | --- | --- | --- | --- |"]
    for change in real:
        interval = f"{change.ratio.low:.3f} to {change.ratio.high:.3f}"
        cells = (change.name, f"{change.before:,.4g}", f"{change.now:,.4g}", f"{change.ratio.value:.3f}", interval)
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _median(series: Series) -> float:
    below = 1.0 if series.reference is None else float(np.median(series.reference))
    return float(np.median(series.values)) / below


def _resampled_medians(series: Series, generator: np.random.Generator) -> np.ndarray:
    """Medians, or ratios of medians, of resamples, [resamples]."""
    reference = np.ones(len(series.values)) if series.reference is None else series.reference
    pairs = np.array([series.values, reference], dtype=np.float64)
    num_values = pairs.shape[1]
    length = int(np.ceil(num_values ** (1 / 3) - 1e-9))
    num_blocks = -(-num_values // length)
    medians = []
    for start in range(0, _NUM_RESAMPLES, _CHUNK):
        size = min(_CHUNK, _NUM_RESAMPLES - start)
        starts = generator.integers(0, num_values, size=(size, num_blocks, 1))
        chosen = ((starts + np.arange(length)) % num_values).reshape(size, -1)[:, :num_values]
        above, below = np.median(pairs[:, chosen], axis=2)
        medians.append(above / below)
    return np.concatenate(medians)
