"""Order of turns, and ratios with intervals on data whose answer is known."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from benchmarks.measure.protocol import order_of_round, standings, turn_orders
from trainer.metrics.paired_times import ratio_of_medians


@pytest.mark.parametrize("num", [2, 3, 4, 5, 6])
def test_everyone_has_every_place_and_follows_everyone_equally_often(num: int) -> None:
    names = [f"c{index}" for index in range(num)]
    orders = turn_orders(names)
    assert all(sorted(order) == names for order in orders)
    places = Counter((name, place) for order in orders for place, name in enumerate(order))
    followers = Counter(pair for order in orders for pair in pairwise(order))
    assert len(places) == num * num
    assert len(set(places.values())) == 1
    assert len(followers) == num * (num - 1)
    assert len(set(followers.values())) == 1


def test_rounds_of_a_cycle_are_its_orders_and_cycles_differ() -> None:
    names = list("abcde")
    cycles = [[order_of_round(names, 10 * cycle + place, seed=3) for place in range(10)] for cycle in range(3)]
    assert all(sorted(cycle) == sorted(turn_orders(names)) for cycle in cycles)
    assert cycles[0] != cycles[1] != cycles[2]
    assert order_of_round(names, 17, seed=3) == cycles[1][7]
    assert [order_of_round(names, place, seed=4) for place in range(10)] != cycles[0]


def test_interval_of_a_ratio_that_is_the_same_in_every_pair_is_a_point() -> None:
    base = np.random.default_rng(0).lognormal(size=300)
    ratio = ratio_of_medians(list(1.07 * base), list(base))
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((1.07, 1.07, 1.07))


def test_interval_holds_the_true_ratio_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(1)
    num_held, widths = 0, []
    for trial in range(100):
        base = generator.lognormal(sigma=0.1, size=60)
        other = 1.05 * generator.lognormal(sigma=0.1, size=60)
        ratio = ratio_of_medians(list(other), list(base), seed=trial, num_resamples=1000)
        num_held += ratio.low <= 1.05 <= ratio.high
        widths.append(ratio.high - ratio.low)
    # 95 of 100 expected; the binomial distribution leaves 88 to 100 in all but one case of a thousand.
    assert num_held >= 88
    # Not so wide that it always holds: the standard error of a median is 1.2533 sigma / sqrt(n), of a ratio sqrt(2)
    # times that, and 95 % are 3.92 of them.
    expected = 3.92 * np.sqrt(2) * 1.2533 * 0.1 / np.sqrt(60) * 1.05
    assert np.mean(widths) == pytest.approx(expected, rel=0.25)


def test_pairs_stay_together() -> None:
    """What slows both sides of a pair widens the interval of an unpaired bootstrap, not of this one."""
    generator = np.random.default_rng(2)
    load = generator.lognormal(sigma=1.0, size=300)
    noise = generator.lognormal(sigma=0.01, size=300)
    paired = ratio_of_medians(list(load * noise), list(load))
    apart = ratio_of_medians(list(generator.permutation(load * noise)), list(load))
    assert paired.high - paired.low < 0.1 * (apart.high - apart.low)


def test_standings_divide_by_the_reference() -> None:
    found = {row.name: row for row in standings({"a": [[2.0, 4.0, 6.0]], "b": [[3.0, 6.0, 18.0]]}, "a")}
    assert found["a"].ratio is None
    assert (found["a"].median_s, found["a"].mean_s, found["a"].mean_ratio) == (4.0, 4.0, 1.0)
    assert found["b"].ratio is not None
    assert (found["b"].ratio.value, found["b"].mean_ratio) == (pytest.approx(1.5), 2.25)
    twice = standings({"a": [[2.0], [4.0]], "b": [[4.0], [4.0]]}, "a")[1]
    assert twice.ratio is not None
    assert (twice.median_s, twice.ratio.value, twice.ratio.spread) == pytest.approx((4.0, 2.0**0.5, 1.0))
