"""How contestants are compared: balanced order, discarded warm-up, ratios of medians with bootstrap intervals."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.measure.starts import RatioOfStarts, Starts, ratio_over_starts


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


def order_of_round(names: Sequence[str], round_index: int, seed: int | str) -> list[str]:
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
class Standing:
    """How one contestant did.

    Attributes:
        name: the contestant.
        median_s: the median over starts of their median times of a step, in seconds.
        mean_s: mean time of a step, in seconds; unlike the median it sees what happens in few steps, such as logging.
        ratio: median over the reference's median, over starts; None for the reference itself.
        mean_ratio: mean over the reference's mean.
    """

    name: str
    median_s: float
    mean_s: float
    ratio: RatioOfStarts | None
    mean_ratio: float


def standings(step_times_s: Mapping[str, Starts], reference: str) -> list[Standing]:
    """Every contestant against the reference, in the given order.

    Args:
        step_times_s: each contestant's step times in seconds, start by start one per round, rounds in the same order.
        reference: name of the one that others are divided by.
    """
    base = step_times_s[reference]
    return [
        Standing(
            name=name,
            median_s=float(np.median([np.median(times) for times in starts])),
            mean_s=float(np.mean(np.concatenate(starts))),
            ratio=None if name == reference else ratio_over_starts(starts, base),
            mean_ratio=float(np.mean(np.concatenate(starts)) / np.mean(np.concatenate(base))),
        )
        for name, starts in step_times_s.items()
    ]
