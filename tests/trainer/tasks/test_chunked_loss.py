"""The loss computed in chunks against the loss of all logits at once."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from sharding.ranks.errors import UserError
from trainer.config.sections import ModelConfig
from trainer.data.facts import SampleFacts
from trainer.tasks import chunked_loss
from trainer.tasks.causal_lm import CausalLanguageModelling
from trainer.tasks.chunked_loss import ChunkedLossHead
from trainer.tasks.task import Task

_Z_LOSS = 0.3
_NUM_POSITIONS = 24


def _config(model_type: str = "llama", **fields: Any) -> ModelConfig:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = sizes | {"num_key_value_heads": 1, "head_dim": 8} | fields
    return ModelConfig(architecture=model_type, config=config, attention="eager")


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    labels = torch.randint(0, 37, (3, 8))
    labels[0, 4:] = -100
    labels[2] = -100
    return {"input_ids": torch.randint(0, 37, (3, 8)), "labels": labels}


def _pair(config: Any, z_loss: float, chunk_tokens: int) -> list[tuple[CausalLanguageModelling, nn.Module]]:
    """The same model twice, with the loss of all logits and with that of chunks."""
    made = []
    for task in (CausalLanguageModelling(z_loss), CausalLanguageModelling(z_loss, chunk_tokens)):
        torch.manual_seed(1)
        made.append((task, task.build_model(config, SampleFacts(8, 37)).train()))
    return made


def _loss_and_gradients(task: Task, model: nn.Module, batch: Any) -> tuple[Any, dict[str, Any]]:
    loss = task.loss(task.forward(model, batch), batch)
    (0.25 * loss).backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


# 7 leaves 3 of 24 positions for the last chunk.
@pytest.mark.parametrize("chunk_tokens", [1, 7, _NUM_POSITIONS, 1000])
@pytest.mark.parametrize("z_loss", [0.0, _Z_LOSS])
@pytest.mark.parametrize("is_tied", [True, False])
def test_loss_and_gradients_are_the_same(batch: Any, chunk_tokens: int, z_loss: float, is_tied: bool) -> None:
    whole, chunked = _pair(_config(tie_word_embeddings=is_tied), z_loss, chunk_tokens)
    expected, gradients = _loss_and_gradients(*whole, batch)
    # Twice: what a pass leaves behind must not reach the next.
    for _ in range(2):
        chunked[1].zero_grad()
        loss, own = _loss_and_gradients(*chunked, batch)
        assert loss.dtype is torch.float32
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
        assert own.keys() == gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(own[name], gradient, rtol=1e-5, atol=1e-6)


def test_a_projection_with_a_bias(batch: Any) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(3, 8, 16, requires_grad=True)
    head, reference = nn.Linear(16, 37), nn.Linear(16, 37)
    reference.load_state_dict(head.state_dict())
    ChunkedLossHead.take_over(head, 5, 0.0)
    assert isinstance(head, ChunkedLossHead)
    torch.testing.assert_close(head(hidden), reference(hidden))
    head.targets = batch["labels"]
    head(hidden).backward()
    expected = nn.functional.cross_entropy(reference(hidden).flatten(0, 1), batch["labels"].flatten(), reduction="sum")
    expected.backward()
    assert head.bias.grad is not None
    torch.testing.assert_close(head.bias.grad, reference.bias.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(head.weight.grad, reference.weight.grad, rtol=1e-5, atol=1e-6)


def test_bf16_stays_within_its_rounding(batch: Any) -> None:
    whole, chunked = _pair(_config(), 0.0, 7)
    for _, model in (whole, chunked):
        model.to(torch.bfloat16)
    expected, gradients = _loss_and_gradients(*whole, batch)
    loss, own = _loss_and_gradients(*chunked, batch)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-3)
    for name, gradient in gradients.items():
        assert own[name].dtype is gradient.dtype
        assert (own[name] - gradient).norm() <= 2e-2 * gradient.norm(), name


class _Products(TorchDispatchMode):
    """Records the shapes of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            self.shapes.append(tuple(result.shape))
        return result


def _head(chunk_tokens: int, dtype: torch.dtype, *, is_frozen: bool = False) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    head = nn.Linear(16, 37, bias=False, dtype=dtype).requires_grad_(not is_frozen)
    hidden = torch.randn(3, 8, 16, dtype=dtype, requires_grad=True)
    ChunkedLossHead.take_over(head, chunk_tokens, _Z_LOSS)
    return head, hidden


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_weights_add_up_in_fp32_some_rows_at_a_time(
    batch: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels, gradients = batch["labels"], {}
    for chunk_tokens, rows in ((1000, 4096), (7, 4096), (7, 10)):
        monkeypatch.setattr(chunked_loss, "_ROWS_AT_ONCE", rows)
        head, hidden = _head(chunk_tokens, dtype)
        head.targets = labels
        with _Products() as products:
            head(hidden).backward()
        assert head.weight.grad is not None
        assert hidden.grad is not None
        gradients[chunk_tokens, rows] = head.weight.grad, hidden.grad
        assert ((37, 16) in products.shapes) == (rows > 37)
    exact = nn.Linear(16, 37, bias=False)
    exact.weight.data.copy_(_head(7, dtype)[0].weight.data)
    logits = exact(_head(7, dtype)[1].detach().float()).flatten(0, 1)
    log_z = logits.logsumexp(dim=-1)
    losses = functional.cross_entropy(logits, labels.flatten(), reduction="none") + _Z_LOSS * log_z.square()
    losses[labels.flatten() != -100].sum().backward()
    assert exact.weight.grad is not None
    for of_weight, of_hidden in gradients.values():
        assert of_weight.dtype is of_hidden.dtype is dtype
        assert (of_weight.float() - exact.weight.grad).norm() <= 6e-3 * exact.weight.grad.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_frozen_projection_has_no_product_for_its_gradient(batch: Any, dtype: torch.dtype) -> None:
    counts = []
    for is_frozen in (False, True):
        head, hidden = _head(7, dtype, is_frozen=is_frozen)
        head.targets = batch["labels"]
        with _Products() as products:
            head(hidden).backward()
        assert (head.weight.grad is None) == is_frozen
        assert hidden.grad is not None
        counts.append(len(products.shapes))
    # Logits and gradient by hidden states of each of four chunks, and the gradient by the weight.
    assert counts == [12, 8]


def test_evaluation_is_the_cross_entropy_alone_and_keeps_no_gradient(batch: Any) -> None:
    whole, chunked = _pair(_config(), _Z_LOSS, 7)
    sums = []
    for task, model in (whole, chunked):
        with torch.no_grad():
            found = task.evaluate(task.forward(model.eval(), batch), batch)
        assert not found["loss"].requires_grad
        sums.append({name: total.item() for name, total in found.items()})
    assert sums[1] == pytest.approx(sums[0], rel=1e-6)
    # Logits are there for who asks without targets, such as generation.
    assert chunked[1](batch["input_ids"]).logits.shape == (3, 8, 37)


def test_a_batch_without_targets_has_no_loss_and_no_gradient(batch: Any) -> None:
    _, (task, model) = _pair(_config(), _Z_LOSS, 7)
    loss, gradients = _loss_and_gradients(task, model, batch | {"labels": torch.full((3, 8), -100)})
    assert loss.item() == 0.0
    assert all(not gradient.any() for gradient in gradients.values())


def test_a_loss_that_is_not_finite_is_told_as_it_is(batch: Any) -> None:
    _, (task, model) = _pair(_config(tie_word_embeddings=False), 0.0, 7)
    weight = model.get_parameter("lm_head.weight")
    with torch.no_grad():
        weight[5, 0] = torch.nan
    loss, gradients = _loss_and_gradients(task, model, batch)
    assert loss.isnan()
    assert gradients["lm_head.weight"].isnan().any()


def test_a_model_that_changes_its_logits_is_refused(batch: Any) -> None:
    _, (task, model) = _pair(_config("gemma2", final_logit_softcapping=30.0), 0.0, 7)
    # A loss of 0 says nothing: it stays 0 under every cap.
    outputs = task.forward(model, batch | {"labels": torch.full((3, 8), -100)})
    assert outputs.loss_sum is not None
    assert outputs.loss_sum.item() == 0.0
    with pytest.raises(UserError, match=r"task.loss_chunk_tokens=7 does not fit this model.*soft cap"):
        task.forward(model, batch)
