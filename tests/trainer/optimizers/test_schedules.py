"""Learning-rate curves against values worked out by hand."""

from itertools import pairwise
from typing import Any, get_args

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from trainer.config.schedule import ScheduleConfig, num_warmup_steps
from trainer.optimizers.schedules import learning_rate

_CURVES = get_args(ScheduleConfig.model_fields["name"].annotation)


def _rates(total: int = 10, **settings: object) -> list[float]:
    schedule = ScheduleConfig.model_validate({"warmup_steps": 2, "final_lr_ratio": 0.0} | settings)
    return [learning_rate(step, 1.0, schedule, total) for step in range(1, total + 1)]


def test_warm_up_is_linear_and_reaches_the_peak_at_its_last_step() -> None:
    for name in _CURVES:
        assert _rates(name=name, decay_every_steps=3)[:2] == [0.5, 1.0], name


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


def test_inverse_sqrt_halves_in_four_times_the_warm_up() -> None:
    rates = _rates(total=32, name="inverse_sqrt")
    assert rates[2:5] == pytest.approx([(2 / 3) ** 0.5, (2 / 4) ** 0.5, (2 / 5) ** 0.5])
    assert (rates[7], rates[31]) == pytest.approx((0.5, 0.25))
    assert _rates(total=4, name="inverse_sqrt", warmup_steps=0) == pytest.approx([1.0, 2**-0.5, 3**-0.5, 0.5])


def test_exponential_falls_by_its_factor_in_its_steps() -> None:
    rates = _rates(name="exponential", decay_rate=0.25, decay_every_steps=2)
    assert rates[2:] == pytest.approx([0.5**n for n in range(1, 9)])


def test_step_falls_after_so_many_steps_or_after_each_milestone() -> None:
    assert _rates(name="step", decay_every_steps=3)[2:] == [1, 1, 1, 0.5, 0.5, 0.5, 0.25, 0.25]
    assert _rates(name="step", milestones=[4, 5], decay_rate=0.1)[2:] == pytest.approx([1, 1, 0.1] + [0.01] * 5)
    assert _rates(total=4, name="step", warmup_steps=0, decay_every_steps=2) == [1, 1, 0.5, 0.5]


def test_torch_agrees_about_steps_and_milestones() -> None:
    from torch import nn
    from torch.optim import SGD, lr_scheduler

    cases: list[tuple[dict[str, Any], Any]] = [
        ({"decay_every_steps": 4}, lambda optimizer: lr_scheduler.StepLR(optimizer, 4, gamma=0.5)),
        ({"milestones": [3, 7]}, lambda optimizer: lr_scheduler.MultiStepLR(optimizer, [3, 7], gamma=0.5)),
    ]
    for settings, scheduler in cases:
        optimizer = SGD([nn.Parameter()], lr=1.0)
        theirs, found = scheduler(optimizer), []
        for _ in range(12):
            found += theirs.get_last_lr()
            optimizer.step()
            theirs.step()
        assert _rates(total=12, name="step", warmup_steps=0, **settings) == pytest.approx(found), settings


def test_warm_up_is_steps_or_a_share_of_the_schedule() -> None:
    for name in ("cosine", "wsd", "inverse_sqrt"):
        assert _rates(total=30, name=name, warmup_steps=0, warmup_fraction=0.1) == _rates(
            total=30, name=name, warmup_steps=3
        )
    # 1.1 x 10 is more than 11 in binary, and so is 0.07 x 100 than 7.
    assert num_warmup_steps(ScheduleConfig(warmup_fraction=0.07), 100) == 7
    assert num_warmup_steps(ScheduleConfig(warmup_fraction=0.07), 101) == 8
    assert num_warmup_steps(ScheduleConfig(), 100) == 0


@st.composite
def _schedules(draw: st.DrawFn) -> tuple[ScheduleConfig, int]:
    warmup = draw(st.integers(0, 50))
    total = warmup + draw(st.integers(1, 200))
    name = draw(st.sampled_from(_CURVES))
    every = draw(st.integers(1, 60))
    uses_milestones = name == "step" and draw(st.booleans())
    schedule = ScheduleConfig(
        name=name,
        warmup_steps=warmup,
        final_lr_ratio=draw(st.floats(0.0, 1.0)),
        decay_steps=draw(st.integers(0, total - warmup)) if name == "wsd" else 0,
        power=draw(st.floats(0.1, 4.0)),
        decay_rate=draw(st.floats(0.01, 0.99)),
        decay_every_steps=0 if uses_milestones else every,
        milestones=tuple(sorted({warmup + 1 + every, warmup + 2 * every + 1})) if uses_milestones else (),
    )
    return schedule, total


@given(_schedules(), st.floats(1e-6, 10.0))
def test_every_curve_rises_to_its_peak_and_never_rises_again(case: tuple[ScheduleConfig, int], peak: float) -> None:
    schedule, total = case
    rates = [learning_rate(step, peak, schedule, total) for step in range(1, total + 20)]
    slack = 1e-9 * peak
    warmup = schedule.warmup_steps
    assert all(0.0 <= rate <= peak + slack for rate in rates)
    assert all(later > earlier for earlier, later in pairwise(rates[:warmup]))
    assert all(later <= earlier + slack for earlier, later in pairwise(rates[max(warmup - 1, 0) :]))
    assert all(rate >= peak * schedule.final_lr_ratio - slack for rate in rates[max(warmup - 1, 0) :])
    if warmup:
        assert rates[warmup - 1] == pytest.approx(peak)


@given(st.integers(1, 1000), st.floats(0.01, 0.99), st.integers(1, 1000))
@example(10, 0.5, 10)
def test_curves_leave_warm_up_without_a_jump(warmup: int, decay_rate: float, every: int) -> None:
    common: dict[str, Any] = {"warmup_steps": warmup, "final_lr_ratio": 0.0}
    exponential = ScheduleConfig(name="exponential", decay_rate=decay_rate, decay_every_steps=every, **common)
    assert learning_rate(warmup, 1.0, exponential, 1) == 1.0
    assert learning_rate(warmup + every, 1.0, exponential, 1) == pytest.approx(decay_rate)
    inverse = ScheduleConfig(name="inverse_sqrt", **common)
    assert learning_rate(warmup, 1.0, inverse, 1) == 1.0
    # One step takes at most the share 1 / (2 w) away, to first order.
    assert learning_rate(warmup + 1, 1.0, inverse, 1) >= 1.0 - 1.0 / (2 * warmup)
    drops = ScheduleConfig(name="step", decay_rate=decay_rate, decay_every_steps=every, **common)
    assert learning_rate(warmup + every, 1.0, drops, 1) == 1.0
    assert learning_rate(warmup + every + 1, 1.0, drops, 1) == pytest.approx(decay_rate)
