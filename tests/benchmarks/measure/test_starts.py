"""Ratios over several starts, on data whose answer is known."""

import numpy as np
import pytest

from benchmarks.measure.starts import Starts, ratio_over_starts
from trainer.metrics.paired_times import ratio_of_medians


def _starts(generator: np.random.Generator, ratio: float, of_start: float, num: int = 5) -> tuple[Starts, Starts]:
    """A contestant and the plain loop: a machine that is busy now and then, and a factor of each start's own."""
    numerator, denominator = [], []
    for factor in ratio * generator.lognormal(sigma=of_start, size=num):
        load = generator.lognormal(sigma=0.03, size=60)
        numerator.append(list(factor * load * generator.lognormal(sigma=0.01, size=60)))
        denominator.append(list(load * generator.lognormal(sigma=0.01, size=60)))
    return numerator, denominator


def test_a_copy_is_found_to_be_no_different_also_where_starts_differ_and_a_difference_is_found() -> None:
    generator = np.random.default_rng(0)
    num_trials = 40
    held = pooled_held = faster = 0
    for trial in range(num_trials):
        copy, plain = _starts(generator, 1.0, of_start=0.018)
        found = ratio_over_starts(copy, plain, seed=trial)
        held += found.low <= 1.0 <= found.high
        # As if all pairs were of one start.
        pooled = ratio_of_medians(np.concatenate(copy).tolist(), np.concatenate(plain).tolist(), num_resamples=500)
        pooled_held += pooled.low <= 1.0 <= pooled.high
        faster += ratio_over_starts(*_starts(generator, 0.93, of_start=0.018), seed=trial).is_below_one
    # 38 of 40 expected; the binomial distribution leaves 33 or more in all but one case of a thousand.
    assert held >= 33
    assert pooled_held < 30, "the spread between starts is what the interval of pairs alone leaves out"
    assert faster >= 36, "and 7 percent are found all the same"


def test_where_starts_agree_the_interval_is_not_much_wider_than_that_of_the_pairs() -> None:
    generator = np.random.default_rng(1)
    copy, plain = _starts(generator, 1.05, of_start=0.0)
    found = ratio_over_starts(copy, plain)
    pooled = ratio_of_medians(np.concatenate(copy).tolist(), np.concatenate(plain).tolist())
    assert found.low <= 1.05 <= found.high
    assert found.high - found.low < 4 * (pooled.high - pooled.low)


def test_the_ratio_is_the_geometric_mean_of_the_starts_which_are_told_with_their_spread() -> None:
    base = np.random.default_rng(2).lognormal(size=30)
    found = ratio_over_starts([list(0.5 * base), list(0.8 * base)], [list(base), list(base)])
    assert found.by_start == pytest.approx((0.5, 0.8))
    assert found.value == pytest.approx(0.4**0.5)
    assert found.spread == pytest.approx(0.6)
    # Of two starts, one may be all that is drawn.
    assert (found.low, found.high) == pytest.approx((0.5, 0.8))
    assert found.times(2.0).by_start == pytest.approx((1.0, 1.6))
    assert found.is_below_one
    assert not found.times(2.0).is_below_one


def test_one_start_says_nothing_of_others_so_that_nobody_is_faster_by_it() -> None:
    base = np.random.default_rng(3).lognormal(size=60)
    found = ratio_over_starts([list(0.5 * base)], [list(base)])
    assert (found.value, found.low, found.high) == pytest.approx((0.5, 0.5, 0.5))
    assert not found.is_below_one
    with pytest.raises(ValueError, match="the same starts on both sides, not 1 and 2"):
        ratio_over_starts([[1.0]], [[1.0], [1.0]])


def test_two_races_of_a_start_are_drawn_together_and_their_steps_are_not() -> None:
    """A start in which the machine is slow slows a race and its base: their ratio is the same in all starts."""
    generator = np.random.default_rng(4)
    slowness = generator.lognormal(sigma=0.3, size=5)
    base = [list(slow * generator.lognormal(sigma=0.01, size=60)) for slow in slowness]
    race = [list(2.0 * slow * generator.lognormal(sigma=0.01, size=40)) for slow in slowness]
    found = ratio_over_starts(race, base, in_pairs=False)
    assert found.low <= 2.0 <= found.high
    assert found.high - found.low < 0.05
