"""The gradient noise scale against problems whose answer is known, and against itself under every strategy."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import nn

from sharding.config import ParallelConfig
from sharding.engine import Batch, ModelDefinition
from sharding.mesh import build_mesh
from sharding.part import Part
from sharding.ranks.object_exchange import sum_over_ranks
from sharding.ranks.process_group import Ranks
from sharding.torch_engine import TorchEngine
from tests.sharding.engine_cases import random_batch, tiny_engine
from tests.support import run_on_ranks
from trainer.metrics.noise_scale import NoiseScale, train_and_measure

_DIM = 20


class _Mean(nn.Module):
    """Squared distance of tokens from a mean: a token x has the gradient w - x, a normal variable around G = w - m."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(_DIM))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return 0.5 * (self.weight - tokens).square().sum()


def _mean_engine(ranks: Ranks) -> TorchEngine:
    definition = ModelDefinition(
        model=_Mean(),
        initialize=lambda module: None,
        loss=lambda model, batch: model(batch["tokens"]),
        evaluate=lambda model, batch: model(batch["tokens"]),
        seed=0,
    )
    mesh = build_mesh(ParallelConfig(strategy="none"), ranks)

    def build(parameters: Iterable[Part]) -> torch.optim.Optimizer:
        return torch.optim.SGD([parameter.tensor for parameter in parameters], lr=0.1, fused=True)

    return TorchEngine(definition, mesh, ranks.device, None, build)


def _known_scale(ranks: Ranks) -> None:
    generator = torch.Generator().manual_seed(1)
    true_gradient, deviation = 0.3, 2.0
    # |G|^2 = 20 x 0.09 = 1.8 and tr(C) = 20 x 4 = 80.
    expected = deviation**2 / true_gradient**2
    engine, total_variance, total_square, num_steps = _mean_engine(ranks), 0.0, 0.0, 2000
    for _ in range(num_steps):
        # Ragged micro-batches, one of them empty.
        counts = [2, 0, 9, 5]
        batches = [
            {"tokens": -true_gradient + deviation * torch.randn(count, _DIM, generator=generator)} for count in counts
        ]
        _, measured = train_and_measure(engine, batches, counts, sum(counts))
        assert measured.num_micro_batches == 3
        # Without smoothing: each step's own estimates, which only their mean makes exact.
        one = NoiseScale()
        one.add(float(measured.square), 3, float(engine.clip_grad_norm(1.0)), sum(counts))
        total_variance += one.variance
        total_square += one.gradient_square
        engine.step(0.0)
    # The averages lack a factor of 1 - 0.9 on their first step.
    assert total_variance / num_steps / 0.1 == pytest.approx(80.0, rel=0.02)
    assert total_square / num_steps / 0.1 == pytest.approx(1.8, rel=0.15)
    assert total_variance / total_square == pytest.approx(expected, rel=0.15)


def test_a_known_noise_scale_is_found() -> None:
    run_on_ranks(_known_scale, 1)


def test_two_estimates_are_exact_without_chance() -> None:
    scale = NoiseScale()
    # 4 micro-batches of 10 tokens: |G|^2 + tr(C) / 10 = 5 and |G|^2 + tr(C) / 40 = 2.
    scale.add(5.0, 4, 2.0**0.5, 40)
    assert scale.tokens == pytest.approx(40.0)
    assert (scale.variance, scale.gradient_square) == pytest.approx((4.0, 0.1))
    for _ in range(200):
        scale.add(3.0, 4, 2.0**0.5, 40)
    assert (scale.variance, scale.gradient_square) == pytest.approx((40 / 3, 5 / 3))
    assert scale.tokens == pytest.approx(8.0)


def test_what_cannot_be_measured_changes_nothing() -> None:
    scale = NoiseScale(2.0, 6.0)
    for square, count, norm in ((5.0, 1, 1.0), (5.0, 0, 1.0), (float("nan"), 4, 1.0), (5.0, 4, float("inf"))):
        scale.add(square, count, norm, 40)
    assert (scale.gradient_square, scale.variance, scale.tokens) == (2.0, 6.0, 3.0)


def test_there_is_no_scale_while_an_estimate_is_not_positive() -> None:
    assert NoiseScale().tokens is None
    assert NoiseScale(-1.0, 5.0).tokens is None
    assert NoiseScale(1.0, -5.0).tokens is None


def _own_gradients(model: nn.Module, loss: Any, batches: list[Batch], denominator: int) -> list[float]:
    """Each micro-batch's squared gradient norm, from a backward pass of its own."""
    squares = []
    for batch in batches:
        model.zero_grad()
        loss(model, batch).backward()
        squares.append(sum(float(p.grad.double().square().sum()) for p in model.parameters() if p.grad is not None))
    model.zero_grad()
    return [square / denominator**2 for square in squares]


_BATCHES = [random_batch(seed, num_rows=1 + seed % 2) for seed in range(4)]
_COUNTS = [int((batch["labels"] != -100).sum()) for batch in _BATCHES]


def _shares_in_one_process(ranks: Ranks, folder: Any) -> None:
    for settings in ({}, {"activation_checkpointing": {"mode": "full"}}):
        engine = tiny_engine(ranks, "none", **settings)
        expected = _own_gradients(engine._model, engine._loss, _BATCHES, sum(_COUNTS))  # type: ignore[attr-defined]
        _, shares = engine.train_batch_with_norms(_BATCHES, sum(_COUNTS))
        # The embedding is tied to the output: a hook that fired at each use would count it twice.
        assert shares.tolist() == pytest.approx(expected, rel=1e-5), settings
        engine.clip_grad_norm(1.0)
        engine.step(1e-2)
    (folder / "expected").write_text(repr(_measure(tiny_engine(ranks, "none"), ranks)))
    untied = {"model": {"architecture": "llama", "config": _untied()}}
    engine = tiny_engine(ranks, "none", **untied)
    expected = _own_gradients(engine._model, engine._loss, _BATCHES, sum(_COUNTS))  # type: ignore[attr-defined]
    _, shares = engine.train_batch_with_norms(_BATCHES, sum(_COUNTS))
    assert shares.tolist() == pytest.approx(expected, rel=1e-5)


def _untied() -> dict[str, Any]:
    from tests.support import TINY_MODEL

    return TINY_MODEL["config"] | {"tie_word_embeddings": False}  # type: ignore[operator]


def _measure(engine: Any, ranks: Ranks, num_steps: int = 3) -> list[tuple[float, float, float]]:
    """Measured and unmeasured steps in turn: token-weighted square, gradient norm, smoothed scale."""
    per_rank = len(_BATCHES) // ranks.world_size
    mine = slice(ranks.rank * per_rank, (ranks.rank + 1) * per_rank)
    scale, found = NoiseScale(), []
    for step in range(num_steps):
        if step == 1:
            engine.train_batch(_BATCHES[mine], sum(_COUNTS))
            engine.clip_grad_norm(1.0)
        else:
            loss_sum, noise = train_and_measure(engine, _BATCHES[mine], _COUNTS[mine], sum(_COUNTS))
            norm = float(engine.clip_grad_norm(1.0))
            assert loss_sum.isfinite()
            sums = torch.stack([noise.square, torch.tensor(float(noise.num_micro_batches)).double()])
            square, count = sum_over_ranks(sums, ranks)
            assert count == len(_BATCHES)
            scale.add(square, int(count), norm, sum(_COUNTS))
            found.append((square, norm, scale.variance / scale.gradient_square))
        engine.step(1e-2)
    return found


def _shares_on_ranks(ranks: Ranks, folder: Any) -> None:
    expected = eval((folder / "expected").read_text())
    cases = [(strategy, {}) for strategy in ("ddp", "zero1", "zero2", "zero3")]
    cases.append(("zero3", {"activation_checkpointing": {"mode": "full"}}))
    cases.append(("ddp", {"backend": "accelerate"}))
    for strategy, sections in cases:
        engine = tiny_engine(ranks, strategy, **sections)
        found = _measure(engine, ranks)
        for after, before in zip(found, expected, strict=True):
            assert after == pytest.approx(before, rel=1e-4), (strategy, sections)
        engine = tiny_engine(ranks, strategy, precision={"compute": "bf16"}, **sections)
        assert _measure(engine, ranks)[0][0] == pytest.approx(expected[0][0], rel=0.05), (strategy, sections)
    # Shares of the loss-scaled gradient are those of the gradient.
    engine = tiny_engine(ranks, "ddp", precision={"compute": "fp16", "initial_loss_scale": 1024.0})
    assert _measure(engine, ranks)[0][0] == pytest.approx(expected[0][0], rel=0.05)


@pytest.mark.timeout(500)
def test_shares_are_each_micro_batchs_own_gradient_under_every_strategy(tmp_path: Any) -> None:
    run_on_ranks(_shares_in_one_process, 1, tmp_path, timeout_s=200)
    run_on_ranks(_shares_on_ranks, 2, tmp_path, timeout_s=280)


def _hooks_are_gone(ranks: Ranks) -> None:
    engine = tiny_engine(ranks, "none")
    model = engine._model  # type: ignore[attr-defined]
    train_and_measure(engine, _BATCHES, _COUNTS, sum(_COUNTS))
    assert not model._forward_pre_hooks
    assert not any(parameter._backward_hooks for parameter in model.parameters())


def test_steps_that_are_not_measured_pay_nothing() -> None:
    run_on_ranks(_hooks_are_gone, 1)
