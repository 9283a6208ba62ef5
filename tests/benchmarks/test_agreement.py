"""When two contestants do the same work: losses and gradient norms, step by step."""

import math

import pytest
import torch

from benchmarks.contestants.agreement import agreement
from benchmarks.contestants.contest import StepLog
from benchmarks.contestants.race import build_order

_LOSSES = [8.0 - 0.01 * step for step in range(1, 121)]
_NORMS = [1.0 + 0.002 * step for step in range(1, 121)]


def _complaint(log: StepLog) -> str:
    return agreement("peer", log, _LOSSES, _NORMS, torch.float32).complaint


def _log(loss_factor: float, norm_factor: float, step: int = 10) -> StepLog:
    return StepLog({step: loss_factor * _LOSSES[step - 1]}, {step: norm_factor * _NORMS[step - 1]})


def test_rounding_passes_and_other_work_is_named_with_both_figures() -> None:
    assert not _complaint(_log(1 + 5e-5, 1 - 5e-4))
    assert "its loss of step 10 is" in _complaint(_log(1 + 2e-4, 1.0))
    assert "its gradient norm of step 10 is 2.04, the plain loop's 1.02; they may differ by 1e-03" in _complaint(
        _log(1.0, 2.0)
    )
    assert "its gradient norm" in _complaint(_log(1.0, math.nan))


def test_what_training_makes_of_rounding_passes_later_and_a_doubled_gradient_does_not() -> None:
    assert not _complaint(_log(1 + 9e-4, 1 + 9e-3, step=30))
    assert _complaint(_log(1 + 9e-4, 1.0, step=20))
    assert not _complaint(_log(1.15, 1.7, step=100))
    assert "its gradient norm of step 100" in _complaint(_log(1.0, 2.0, step=100))
    assert not _complaint(_log(2.0, 2.0, step=110)), "two trainings of one run"


def test_a_mean_over_steps_is_compared_with_the_mean() -> None:
    mean = sum(_LOSSES[:10]) / 10
    assert not _complaint(StepLog({10: mean}, {10: _NORMS[9]}, averaged_over=10))
    assert _complaint(StepLog({10: mean}, {10: _NORMS[9]}))


@pytest.mark.parametrize("log", [StepLog(), StepLog({10: _LOSSES[9]}), StepLog({}, {10: _NORMS[9]})])
def test_who_logs_no_loss_or_no_norm_is_not_compared_and_so_refused(log: StepLog) -> None:
    assert "has not logged loss and gradient norm" in _complaint(log)


def test_the_order_of_building_is_drawn_by_the_start_with_transformers_before_accelerate() -> None:
    names = ["plain", "shardline", "accelerate", "fabric", "transformers"]
    orders = [build_order(names, f"0:{start}") for start in range(20)]
    assert all(sorted(order) == sorted(names) for order in orders)
    assert all(order.index("transformers") < order.index("accelerate") for order in orders)
    assert len({order[0] for order in orders}) > 2
    assert orders[3] == build_order(names, "0:3")
