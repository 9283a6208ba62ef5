"""Ratios of times that were measured in several starts of the same processes, with intervals that hold for all starts.

Within a start contestants take turns, so what slows the machine for a while falls on all of them. What a start itself
decides (where memory lies, which of them was built first, on which cores threads settle) stays for all of its pairs: a
copy of a contestant may be a percent or two faster than the contestant, pair after pair. No number of pairs shows that,
other starts do.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from trainer.metrics.paired_times import CONFIDENCE, Ratio

Starts = Sequence[Sequence[float]]
"""Times in seconds: by start, in the order in which they were measured."""

_NUM_WITHIN = 2_000
_NUM_RESAMPLES = 20_000
_CHUNK = 500
# Quantiles 0.975 of Student's t by degrees of freedom, from 1; far out they go on as the normal distribution's.
_STUDENT = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
)


@dataclass(frozen=True)
class RatioOfStarts(Ratio):
    """A ratio, its interval over starts and pairs, and what each start says by itself.

    Attributes:
        by_start: the ratio of medians in each start.
    """

    by_start: tuple[float, ...]

    @property
    def spread(self) -> float:
        """How far the largest of the starts' ratios is above the smallest, relative."""
        return max(self.by_start) / min(self.by_start) - 1.0

    @property
    def is_below_one(self) -> bool:
        """Whether "faster" may be said: one start knows nothing of others."""
        return len(self.by_start) > 1 and self.high < 1.0

    @property
    def verdict(self) -> str:
        """What may be said of the numerator: of one start nothing, else what the whole interval says."""
        if len(self.by_start) == 1:
            return "of one start"
        if self.is_below_one:
            return "faster"
        return "slower" if self.low > 1.0 else "not told apart"

    def times(self, factor: float) -> "RatioOfStarts":
        """All of it, multiplied."""
        by_start = tuple(factor * ratio for ratio in self.by_start)
        return RatioOfStarts(factor * self.value, factor * self.low, factor * self.high, by_start)


@dataclass(frozen=True)
class _Resampled:
    """Logarithms of a ratio: in each start, and in resamples of starts and pairs."""

    by_start: np.ndarray
    resamples: np.ndarray

    @property
    def value(self) -> float:
        return float(np.exp(self.by_start.mean()))


def ratio_over_starts(
    numerator_s: Starts, denominator_s: Starts, *, in_pairs: bool = True, seed: int = 0
) -> RatioOfStarts:
    """Ratio of two contestants' times: the geometric mean of the starts' ratios of medians.

    The interval is a bootstrap of two levels, starts and then pairs within each of them (Davison and Hinkley,
    "Bootstrap Methods and their Application", 1997, section 3.8). Of few starts percentiles are too narrow, as a normal
    quantile is in Student's place and n in that of n - 1: they are taken further out (the expanded percentiles of
    Hesterberg, "What Teachers Should Know About the Bootstrap", The American Statistician 69, 2015).

    Args:
        numerator_s: one side's times, start by start.
        denominator_s: the other's, in the same starts.
        in_pairs: whether the times of a start belong together one by one; else each side is resampled by itself, as two
            races of a start are.
        seed: of the resamples.

    Raises:
        ValueError: there is no start, or the two have not the same.
    """
    found = _resampled_ratio(numerator_s, denominator_s, in_pairs, np.random.default_rng(seed))
    low, high = _interval(found.resamples, len(found.by_start))
    return RatioOfStarts(found.value, low, high, tuple(float(one) for one in np.exp(found.by_start)))


def change_of_ratio(now: tuple[Starts, Starts], before: tuple[Starts, Starts], seed: int = 0) -> Ratio:
    """A ratio over what it was in another result, each resampled by itself.

    Args:
        now: numerator and denominator of this result, in pairs.
        before: those of the other.
        seed: of the resamples.
    """
    generator = np.random.default_rng(seed)
    new, old = (_resampled_ratio(*sides, True, generator) for sides in (now, before))
    low, high = _interval(new.resamples - old.resamples, min(len(new.by_start), len(old.by_start)))
    return Ratio(new.value / old.value, low, high)


def _resampled_ratio(above: Starts, below: Starts, in_pairs: bool, generator: np.random.Generator) -> _Resampled:
    if not above or len(above) != len(below):
        raise ValueError(f"ratios need the same starts on both sides, not {len(above)} and {len(below)}")
    sides = list(zip(above, below, strict=True))
    by_start = np.log([np.median(upper) / np.median(lower) for upper, lower in sides])
    within = np.log([_resampled(upper, lower, in_pairs, generator) for upper, lower in sides])
    chosen = generator.integers(0, len(sides), size=(_NUM_RESAMPLES, len(sides)))
    picked = generator.integers(0, _NUM_WITHIN, size=chosen.shape)
    return _Resampled(by_start, within[chosen, picked].mean(axis=1))


def _interval(resamples: np.ndarray, num_starts: int) -> tuple[float, float]:
    tail = _tail(num_starts)
    low, high = np.exp(np.quantile(resamples, [tail, 1.0 - tail]))
    return float(low), float(high)


def _resampled(
    above: Sequence[float], below: Sequence[float], in_pairs: bool, generator: np.random.Generator
) -> np.ndarray:
    """Ratios of medians of resamples of one start, [resamples]."""
    sides = np.asarray(above, dtype=np.float64), np.asarray(below, dtype=np.float64)
    ratios = []
    for start in range(0, _NUM_WITHIN, _CHUNK):
        size = min(_CHUNK, _NUM_WITHIN - start)
        chosen = [generator.integers(0, len(side), size=(size, len(side))) for side in sides]
        if in_pairs:
            chosen[1] = chosen[0]
        medians = [np.median(side[indices], axis=1) for side, indices in zip(sides, chosen, strict=True)]
        ratios.append(medians[0] / medians[1])
    return np.concatenate(ratios)


def _tail(num_starts: int) -> float:
    """The share of resamples that lies beyond each end of the interval."""
    tail = (1.0 - CONFIDENCE) / 2
    if num_starts == 1:
        return tail
    freedom = num_starts - 1
    student = _STUDENT[freedom - 1] if freedom <= len(_STUDENT) else NormalDist().inv_cdf(1.0 - tail)
    return NormalDist().cdf(-student * (num_starts / freedom) ** 0.5)
