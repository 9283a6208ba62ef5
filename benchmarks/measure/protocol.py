"""How contestants are compared: balanced order, discarded warm-up, ratios of medians with bootstrap intervals."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
# Medians of this many resamples at a time: what is indexed stays within some ten megabytes.
_CHUNK = 500


def turn_orders(names: Sequence[str]) -> list[list[str]]:
    """A cycle of orders in which everyone has every place, and follows everyone else, equally often.

    What a contestant leaves behind (a warm cache, a thread that is still reading ahead) then falls on all others alike.
    This is Williams' design ("Experimental designs balanced for the estimation of residual effects of treatments",
    1949): n orders for an even number of contestants, 2n for an odd one.
    """
    num = len(names)
    # 0, 1, n-1, 2, n-2, ...: neighbours differ by a different amount each time.
    zigzag = [(step + 1) // 2 if step % 2 else (num - step // 2) % num for step in range(num)]
    rows = [[(place + shift) % num for place in zigzag] for shift in range(num)]
    if num % 2:
        rows += [row[::-1] for row in rows]
    return [[names[index] for index in row] for row in rows]


def order_of_round(names: Sequence[str], round_index: int, seed: int) -> list[str]:
    """Who goes when in one round: each cycle of ``turn_orders`` in a shuffled order of its own, the same on all ranks.

    Args:
        names: the contestants.
        round_index: from 0.
        seed: of the shuffles.
    """
    orders = turn_orders(names)
    cycle, place = divmod(round_index, len(orders))
    random.Random(f"{seed}:{cycle}").shuffle(orders)
    return orders[place]


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile of one or more values."""
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    return float(low), float(middle), float(high)


@dataclass(frozen=True)
class Ratio:
    """A ratio of step times and the interval that holds it with 95 % confidence.

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


@dataclass(frozen=True)
class Standing:
    """How one contestant did.

    Attributes:
        name: the contestant.
        median_s: median time of a step, in seconds.
        mean_s: mean time of a step, in seconds; unlike the median it sees what happens in few steps, such as logging.
        ratio: median over the reference's median; None for the reference itself.
        mean_ratio: mean over the reference's mean.
    """

    name: str
    median_s: float
    mean_s: float
    ratio: Ratio | None
    mean_ratio: float


def standings(step_times_s: Mapping[str, Sequence[float]], reference: str) -> list[Standing]:
    """Every contestant against the reference, in the given order.

    Args:
        step_times_s: each contestant's step times in seconds, one per round, rounds in the same order.
        reference: name of the one that others are divided by.
    """
    base = step_times_s[reference]
    return [
        Standing(
            name=name,
            median_s=float(np.median(times)),
            mean_s=float(np.mean(times)),
            ratio=None if name == reference else ratio_of_medians(times, base),
            mean_ratio=float(np.mean(times) / np.mean(base)),
        )
        for name, times in step_times_s.items()
    ]
