"""The loss of causal language modelling and its gradient against formulas written out."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from trainer.tasks.causal_lm import CausalLanguageModelling
from trainer.tasks.task import Metric

_Z_LOSS = 0.3
_VOCABULARY = 11


class _Bigrams(nn.Module):
    """Logits by the previous token alone."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.table = nn.Parameter(4 * torch.randn(_VOCABULARY, _VOCABULARY, dtype=dtype))

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        return SimpleNamespace(logits=self.table[input_ids])


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    labels = torch.randint(0, _VOCABULARY, (3, 8))
    labels[0, 4:] = -100
    labels[2] = -100
    return {"input_ids": torch.randint(0, _VOCABULARY, (3, 8)), "labels": labels}


def _by_hand(table: torch.Tensor, batch: dict[str, torch.Tensor], z_loss: float) -> tuple[float, torch.Tensor]:
    """Loss and gradient, one target after the other: d(log Z)/d(logits) is the softmax p, so the gradient of a target
    is (1 + 2 z log Z) p - onehot."""
    loss, gradient = 0.0, torch.zeros_like(table, dtype=torch.float64)
    for token, label in zip(batch["input_ids"].flatten().tolist(), batch["labels"].flatten().tolist(), strict=True):
        if label == -100:
            continue
        row = table[token].double()
        log_z = row.exp().sum().log()
        loss += float(log_z - row[label] + z_loss * log_z**2)
        gradient[token] += (1 + 2 * z_loss * log_z) * (row - log_z).exp()
        gradient[token, label] -= 1
    return loss, gradient


@pytest.mark.parametrize("z_loss", [0.0, 1e-4, _Z_LOSS])
def test_loss_and_gradient(batch: dict[str, torch.Tensor], z_loss: float) -> None:
    model, task = _Bigrams(), CausalLanguageModelling(z_loss)
    loss = task.loss(task.forward(model, batch), batch)
    loss.backward()
    expected, gradient = _by_hand(model.table.detach(), batch, z_loss)
    assert loss.dtype is torch.float32
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert model.table.grad is not None
    assert torch.allclose(model.table.grad.double(), gradient, rtol=1e-5, atol=1e-5)


def test_half_precision_logits_are_added_up_in_fp32(batch: dict[str, torch.Tensor]) -> None:
    model = _Bigrams(torch.bfloat16)
    expected, _ = _by_hand(model.table.detach(), batch, _Z_LOSS)
    task = CausalLanguageModelling(_Z_LOSS)
    loss = task.loss(task.forward(model, batch), batch)
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_evaluation_is_the_cross_entropy_alone(batch: dict[str, torch.Tensor]) -> None:
    model = _Bigrams()
    expected, _ = _by_hand(model.table.detach(), batch, 0.0)
    for z_loss in (0.0, _Z_LOSS):
        task = CausalLanguageModelling(z_loss)
        with torch.no_grad():
            sums = task.evaluate(task.forward(model, batch), batch)
        assert {name: total.item() for name, total in sums.items()} == {
            "loss": pytest.approx(expected, rel=1e-6),
            "targets": 12.0,
        }
        assert all(total.dtype is torch.float64 for total in sums.values())
        metrics = task.metrics(sums)
        assert metrics["loss"] == Metric(pytest.approx(expected / 12, rel=1e-6), "lower")
        assert metrics["perplexity"] == Metric(pytest.approx(math.exp(expected / 12), rel=1e-6), "lower")


def test_a_batch_without_targets_has_no_loss_and_no_gradient(batch: dict[str, torch.Tensor]) -> None:
    model = _Bigrams()
    task, masked = CausalLanguageModelling(_Z_LOSS), batch | {"labels": torch.full_like(batch["labels"], -100)}
    loss = task.loss(task.forward(model, masked), masked)
    loss.backward()
    assert loss.item() == 0.0
    assert model.table.grad is not None
    assert not model.table.grad.any()
