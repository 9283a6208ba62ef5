"""SGD with momentum, where torch's own goes wrong and where it does not."""

import pytest
import torch

from trainer.optimizers.momentum_sgd import MomentumSGD


def _optimizer(kind: type[torch.optim.SGD], nesterov: bool) -> tuple[torch.nn.Parameter, torch.optim.SGD]:
    # What a new tensor may hold is then not zero.
    junk = [torch.full((1000,), 1e9) for _ in range(20)]
    del junk
    parameter = torch.nn.Parameter(torch.linspace(-1, 1, 1000))
    optimizer = kind([parameter], lr=0.1, momentum=0.9, nesterov=nesterov, weight_decay=0.1, fused=True)
    return parameter, optimizer


def _step(parameter: torch.nn.Parameter, optimizer: torch.optim.SGD, gradient: float, skip: float = 0.0) -> None:
    parameter.grad = torch.full_like(parameter, gradient)
    optimizer.found_inf = torch.tensor(skip)  # type: ignore[attr-defined]
    optimizer.step()


@pytest.mark.parametrize("nesterov", [False, True])
def test_a_skipped_first_step_leaves_no_trace(nesterov: bool) -> None:
    parameter, optimizer = _optimizer(MomentumSGD, nesterov)
    _step(parameter, optimizer, float("nan"), skip=1.0)
    assert not optimizer.state[parameter]["momentum_buffer"].any()
    expected, torchs = _optimizer(torch.optim.SGD, nesterov)
    for gradient in (0.3, -0.7, 0.1):
        _step(parameter, optimizer, gradient)
        _step(expected, torchs, gradient)
        assert torch.equal(parameter, expected)
    assert torch.equal(optimizer.state[parameter]["momentum_buffer"], torchs.state[expected]["momentum_buffer"])


def test_without_momentum_nothing_is_kept() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = MomentumSGD([parameter], lr=0.5, fused=True)
    _step(parameter, optimizer, 1.0)
    assert torch.equal(parameter, torch.full((3,), 0.5))
    assert not any(value is not None for value in optimizer.state[parameter].values())


def test_a_running_mean_of_gradients_is_momentum_at_another_rate() -> None:
    """v = b v + (1 - b) g at rate eta, as textbooks have it, is momentum b at rate (1 - b) eta."""
    parameter = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = MomentumSGD([parameter], lr=0.1 * (1 - 0.9), momentum=0.9, fused=True)
    mean, expected = torch.zeros(2), parameter.detach().clone()
    for gradient in (0.5, -0.25, 2.0, 0.125):
        mean = 0.9 * mean + (1 - 0.9) * gradient
        expected -= 0.1 * mean
        _step(parameter, optimizer, gradient)
    assert torch.allclose(parameter, expected, rtol=1e-6)
