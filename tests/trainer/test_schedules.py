"""Learning-rate curves against values worked out by hand."""

import pytest

from trainer.schedules import learning_rate
from trainer.sections import ScheduleConfig


def _rates(total: int = 10, **settings: object) -> list[float]:
    schedule = ScheduleConfig.model_validate({"warmup_steps": 2, "final_lr_ratio": 0.0} | settings)
    return [learning_rate(step, 1.0, schedule, total) for step in range(1, total + 1)]


def test_warm_up_is_linear_and_reaches_the_peak_at_its_last_step() -> None:
    for name in ("constant", "linear", "cosine", "wsd", "polynomial"):
        assert _rates(name=name)[:2] == [0.5, 1.0], name


def test_constant_ignores_the_end() -> None:
    assert _rates(name="constant")[2:] == [1.0] * 8


def test_linear() -> None:
    assert _rates(name="linear")[2:] == pytest.approx([7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8, 0])


def test_cosine_is_half_way_down_in_the_middle() -> None:
    rates = _rates(name="cosine")
    assert rates[5] == pytest.approx(0.5)
    assert rates[3] == pytest.approx(0.5 * (1 + 2**-0.5))
    assert rates[9] == pytest.approx(0.0)


def test_wsd_is_stable_and_then_falls() -> None:
    assert _rates(name="wsd", decay_steps=4)[2:] == pytest.approx([1, 1, 1, 1, 0.75, 0.5, 0.25, 0])
    assert _rates(total=20, name="wsd")[17:] == pytest.approx([1, 0.5, 0])


def test_polynomial_is_a_power_of_what_remains() -> None:
    assert _rates(name="polynomial", power=2.0)[5] == pytest.approx(0.25)


def test_the_final_ratio_is_reached_and_kept() -> None:
    schedule = ScheduleConfig(name="cosine", final_lr_ratio=0.1)
    assert learning_rate(10, 2.0, schedule, 10) == pytest.approx(0.2)
    assert learning_rate(15, 2.0, schedule, 10) == pytest.approx(0.2)
