"""Two ways of computing the same, timed in turns, and their ratio with an interval."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
# Medians of this many resamples at a time: what is indexed stays within some ten megabytes.
_CHUNK = 500
_NUM_WARMUP = 5


@dataclass(frozen=True)
class Ratio:
    """A ratio of times and the interval that holds it with 95 % confidence.

    Attributes:
        value: the ratio.
        low: lower end of the interval.
        high: upper end.
    """

    value: float
    low: float
    high: float


def ratio_of_medians(
    numerator_s: Sequence[float], denominator_s: Sequence[float], seed: int = 0, num_resamples: int = 10_000
) -> Ratio:
    """Median over median of paired times, with a percentile bootstrap interval over pairs.

    A resample draws whole pairs, so what slowed both sides of a pair stays on both sides (Efron and Tibshirani, "An
    Introduction to the Bootstrap", 1993, chapters 8 and 13).

    Args:
        numerator_s: one time per pair, in seconds.
        denominator_s: the other time of each pair.
        seed: of the resamples.
        num_resamples: how many.
    """
    pairs = np.array([numerator_s, denominator_s], dtype=np.float64)
    num_pairs = pairs.shape[1]
    generator = np.random.default_rng(seed)
    ratios = []
    for start in range(0, num_resamples, _CHUNK):
        size = min(_CHUNK, num_resamples - start)
        chosen = generator.integers(0, num_pairs, size=(size, num_pairs))
        above, below = np.median(pairs[:, chosen], axis=2)
        ratios.append(above / below)
    tail = (1.0 - CONFIDENCE) / 2
    low, high = np.quantile(np.concatenate(ratios), [tail, 1.0 - tail])
    above, below = np.median(pairs, axis=1)
    return Ratio(float(above / below), float(low), float(high))


def time_in_turns(
    first: Callable[[], object], second: Callable[[], object], *, num_pairs: int, limit_s: float
) -> tuple[list[float], list[float]]:
    """Times of two calls, in seconds, a pair after the other, each of them first in every other pair.

    Args:
        first: one of them.
        second: the other.
        num_pairs: as many pairs count, after some that do not.
        limit_s: no pair begins after so long; two pairs there are in any case.
    """
    calls = (first, second)
    times_s: tuple[list[float], list[float]] = ([], [])
    for _ in range(_NUM_WARMUP):
        first()
        second()
    began_at = time.monotonic()
    for pair in range(num_pairs):
        if pair > 1 and time.monotonic() - began_at > limit_s:
            break
        for index in (0, 1) if pair % 2 else (1, 0):
            called_at = time.perf_counter()
            calls[index]()
            times_s[index].append(time.perf_counter() - called_at)
    return times_s
