"""The spike detector against series whose spikes are known."""

import json
import math
import random
from collections.abc import Iterable

import pytest

from tests.support import ROOT
from trainer.numerics.spike_detector import Spike, SpikeDetector


def _detector(losses: Iterable[float] = (), norms: Iterable[float] = ()) -> SpikeDetector:
    return SpikeDetector(threshold=6.0, window_steps=128, warmup_steps=64, losses=losses, grad_norms=norms)


def _curve(num_steps: int, seed: int) -> list[tuple[float, float]]:
    """Loss and norm of a usual run: a falling loss with noise, and a log-normal norm that wanders."""
    draw = random.Random(seed)
    return [
        (2.5 + 5.0 / (1.0 + step / 100) + draw.gauss(0.0, 0.1), math.exp(draw.gauss(0.3 * math.sin(step / 300), 0.15)))
        for step in range(num_steps)
    ]


def _spikes(detector: SpikeDetector, values: Iterable[tuple[float, float]], *, take_all: bool) -> dict[int, Spike]:
    found = {}
    for step, (loss, norm) in enumerate(values):
        spike = detector.judge(loss, norm)
        if spike is not None:
            found[step] = spike
        if spike is None or take_all:
            detector.accept(loss, norm)
    return found


@pytest.mark.parametrize("seed", range(5))
def test_a_usual_run_has_no_spike(seed: int) -> None:
    assert _spikes(_detector(), _curve(3000, seed), take_all=True) == {}


@pytest.mark.parametrize("take_all", [True, False])
def test_outliers_are_found_and_nothing_else(take_all: bool) -> None:
    values = _curve(1500, 1)
    for step in (100, 500, 501, 502, 1499):
        values[step] = (values[step][0] + 2.0, values[step][1])
    values[900] = (values[900][0], 30.0)
    # Far below is no spike.
    values[1200] = (0.01, 1e-6)
    found = _spikes(_detector(), values, take_all=take_all)
    assert sorted(found) == [100, 500, 501, 502, 900, 1499]
    assert {spike.quantity for step, spike in found.items() if step != 900} == {"loss"}
    spike = found[900]
    assert (spike.quantity, spike.value) == ("grad_norm", 30.0)
    assert spike.median == pytest.approx(1.0, abs=0.4)
    assert spike.deviations == pytest.approx((math.log(30.0) - math.log(spike.median)) / spike.scale)


def test_a_run_that_was_measured_has_no_spike() -> None:
    path = ROOT / "benchmarks" / "results" / "2026-11-25_2xcpu" / "quickstart_every_step.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    values = [(line["train/loss"], line["train/grad_norm"]) for line in lines]
    assert len(values) == 300
    assert _spikes(_detector(), values, take_all=True) == {}
    # What docs/faults.md says of it: the farthest value, and windows that know too little.
    (farthest,) = _spikes(SpikeDetector(4.5, 128, 64), values, take_all=True).values()
    assert (farthest.quantity, round(farthest.deviations, 1)) == ("grad_norm", 4.7)
    assert [len(_spikes(SpikeDetector(6.0, window, 16), values, take_all=True)) for window in (32, 16)] == [1, 3]
    # Not because it would find none there.
    values[200] = (values[200][0] * 1.5, values[200][1])
    values[250] = (values[250][0], values[250][1] * 10)
    assert list(_spikes(_detector(), values, take_all=True)) == [200, 250]


def test_a_loss_near_zero_has_a_spike_where_it_leaves_its_own_scatter() -> None:
    draw = random.Random(5)
    # As of a classification whose steps have few rows: most are right, and the loss varies in proportion.
    values = [(math.exp(draw.gauss(-3.0, 1.2)), 1.0) for _ in range(2000)]
    assert _spikes(_detector(), values, take_all=True) == {}
    values[1500] = (1e4, 1.0)
    assert list(_spikes(_detector(), values, take_all=True)) == [1500]
    # What is below zero has no logarithm.
    below = [(loss - 5.0, norm) for loss, norm in _curve(500, 2)]
    below[400] = (6.0, 1.0)
    assert list(_spikes(_detector(), below, take_all=True)) == [400]


def test_nothing_is_judged_during_the_warm_up() -> None:
    detector = _detector()
    for _ in range(63):
        detector.accept(1.0, 1.0)
    assert detector.judge(1e9, 1e9) is None
    detector.accept(1.0, 1.0)
    assert detector.judge(1e9, 1.0) is not None


def test_a_series_without_spread_has_room_to_move() -> None:
    detector = _detector([2.0] * 64, [0.5] * 64)
    # Six times half a percent.
    assert detector.judge(2.0 * 1.029, 0.5 * 1.029) is None
    assert detector.judge(2.0 * 1.031, 0.5) is not None
    assert detector.judge(2.0, 0.5 * 1.032) is not None
    assert _detector([0.0] * 64, [0.0] * 64).judge(0.0, 0.0) is None


def test_a_level_that_rises_for_good_becomes_the_usual_one_where_its_steps_are_taken() -> None:
    draw = random.Random(3)
    values = [(2.0 + (1.0 if step >= 200 else 0.0) + draw.gauss(0.0, 0.05), 1.0) for step in range(600)]
    found = _spikes(_detector(), values, take_all=True)
    # Until half of the latest steps are of the new level.
    assert sorted(found) == list(range(200, 216))


def test_a_detector_goes_on_from_its_state() -> None:
    values = _curve(400, 4)
    values[350] = (values[350][0], 90.0)
    whole, first = _detector(), _detector()
    expected = _spikes(whole, values, take_all=True)
    _spikes(first, values[:300], take_all=True)
    found = _spikes(_detector(first.losses, first.grad_norms), values[300:], take_all=True)
    assert {step + 300: spike for step, spike in found.items()} == expected
    assert list(expected) == [350]
