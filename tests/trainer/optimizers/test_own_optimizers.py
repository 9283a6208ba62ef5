"""Our optimizers on one process against torch's and torchao's own."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import nn

from sharding.part import Part, whole_part
from trainer.config.optimizer import AdafactorConfig, MuonConfig
from trainer.optimizers.adafactor import Adafactor
from trainer.optimizers.muon import Muon, orthogonalize

MATRICES = ((7, 5), (5, 7), (1, 4), (4, 1), (64, 48))
SHAPES = (*MATRICES, (3,), (2, 3, 4))
NUM_STEPS = 5


def _parameters(shapes: Sequence[tuple[int, ...]], seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def _whole(parameters: Sequence[nn.Parameter]) -> list[Part]:
    return [whole_part(str(index), parameter) for index, parameter in enumerate(parameters)]


def _largest_difference(
    shapes: Sequence[tuple[int, ...]],
    ours: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    other: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
) -> float:
    """Train two copies on the same random gradients, of which the first gets some as multiples and is told by what."""
    first, second = _parameters(shapes), _parameters(shapes)
    optimizers = ours(first), other(second)
    for step in range(1, NUM_STEPS + 1):
        divisor = torch.tensor(300.0) if step % 2 else None
        optimizers[0].grad_scale = divisor  # type: ignore[attr-defined]
        for copies, optimizer, scale in zip((first, second), optimizers, (divisor, None), strict=True):
            for parameter, gradient in zip(copies, _parameters(shapes, seed=step), strict=True):
                parameter.grad = gradient.detach() * (1.0 if scale is None else scale)
            optimizer.step()
    assert not torch.equal(first[0], _parameters(shapes)[0])
    return max((a - b).abs().max().item() for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    "settings",
    [
        AdafactorConfig(),
        # So small a threshold of the root mean square that the updates of random gradients reach it.
        AdafactorConfig(beta2_decay=-0.5, eps=1e-3, min_rms=2.0, clip_threshold=1.0),
    ],
)
def test_adafactor_is_torchs(settings: AdafactorConfig) -> None:
    difference = _largest_difference(
        SHAPES,
        lambda ours: Adafactor([{"params": ours, "weight_decay": 0.1}], _whole(ours), 0.5, settings),
        lambda other: torch.optim.Adafactor(
            other,
            lr=0.5,
            weight_decay=0.1,
            beta2_decay=settings.beta2_decay,
            eps=(settings.eps, settings.min_rms),
            d=settings.clip_threshold,
        ),
    )
    assert difference < 2e-6


@pytest.mark.parametrize("lr_adjustment", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_is_torchs_but_for_its_bf16(lr_adjustment: str, nesterov: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = MuonConfig(lr_adjustment=lr_adjustment, nesterov=nesterov, momentum=0.9)  # type: ignore[arg-type]

    def difference() -> float:
        return _largest_difference(
            MATRICES,
            lambda ours: Muon([{"params": ours, "weight_decay": 0.1}], _whole(ours), None, 0.1, settings),
            lambda other: torch.optim.Muon(
                other, lr=0.1, weight_decay=0.1, momentum=0.9, nesterov=nesterov, adjust_lr_fn=lr_adjustment
            ),
        )

    assert 1e-5 < difference() < 0.1
    monkeypatch.setattr("torch.optim._muon._zeropower_via_newtonschulz", _fp32_newton_schulz)
    assert difference() < 2e-6


def _fp32_newton_schulz(
    gradient: torch.Tensor, coefficients: tuple[float, float, float], num_steps: int, eps: float
) -> torch.Tensor:
    a, b, c = coefficients
    matrix = gradient / gradient.norm().clamp(min=eps)
    for _ in range(num_steps):
        gram = matrix.T @ matrix
        matrix = a * matrix + b * matrix @ gram + c * matrix @ gram @ gram
    return matrix


def test_orthogonalize_brings_singular_values_near_one() -> None:
    for shape in ((40, 24), (24, 40), (32, 32)):
        (matrix,) = _parameters([shape])
        before = matrix.detach().clone()
        values = torch.linalg.svdvals(orthogonalize(matrix.detach(), 10))
        assert 0.6 < values.min() <= values.max() < 1.3, shape
        assert torch.equal(matrix, before)
