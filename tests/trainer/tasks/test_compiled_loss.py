"""The loss that is compiled, with the output projection where that works in chunks, against the plain one."""

from typing import Any

import pytest
import torch
from torch import nn

from sharding.precision import cast_at_ends
from tests.trainer.tasks.test_chunked_loss import _config, _loss_and_gradients, batch
from trainer.config.sections import ModelConfig
from trainer.data.facts import SampleFacts
from trainer.tasks.causal_lm import CausalLanguageModelling
from trainer.tasks.masked_lm import MaskedLanguageModelling
from trainer.tasks.task import Task
from trainer.tasks.vocabulary_loss import compiled_vocabulary_loss

__all__ = ["batch"]


_BERT = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def _model(task: Task, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(1)
    config = _config(tie_word_embeddings=True)
    if isinstance(task, MaskedLanguageModelling):
        config = ModelConfig(architecture="bert", config=_BERT, attention="eager")
    return task.build_model(config, SampleFacts(8, 37)).train().to(dtype)


def _num_graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.timeout(400)
# Of what the compiler does itself.
@pytest.mark.filterwarnings("ignore")
# 7 leaves 3 of 24 positions for the last chunk, which is a shape of its own.
@pytest.mark.parametrize(
    ("chunk_tokens", "num_shapes", "dtype", "tolerance"),
    [
        (0, 1, torch.float32, 1e-6),
        pytest.param(0, 1, torch.bfloat16, 2e-2, marks=pytest.mark.slow),
        pytest.param(7, 2, torch.float32, 1e-6, marks=pytest.mark.slow),
        (7, 2, torch.bfloat16, 2e-2),
    ],
    ids=str,
)
def test_it_is_the_plain_one_and_compiled_once_a_shape(
    batch: Any, chunk_tokens: int, num_shapes: int, dtype: torch.dtype, tolerance: float
) -> None:
    plain = CausalLanguageModelling(0.3, chunk_tokens)
    compiled = CausalLanguageModelling(0.3, chunk_tokens, compiles_loss=True)
    expected, gradients = _loss_and_gradients(plain, _model(plain, dtype), batch)
    model = _model(compiled, dtype)
    torch._dynamo.reset()
    before = _num_graphs()
    for _ in range(2):
        model.zero_grad()
        loss, own = _loss_and_gradients(compiled, model, batch)
        assert loss.dtype is torch.float32
        assert loss.item() == pytest.approx(expected.item(), rel=max(tolerance / 10, 1e-6))
        for name, gradient in gradients.items():
            assert own[name].dtype is dtype
            assert (own[name] - gradient).norm() <= tolerance * gradient.norm(), name
        assert _num_graphs() == before + num_shapes
    # Evaluation compiles nothing.
    with torch.no_grad():
        sums = [task.evaluate(task.forward(model.eval(), batch), batch) for task in (plain, compiled)]
    assert sums[1]["loss"].item() == pytest.approx(sums[0]["loss"].item(), rel=1e-5)
    assert _num_graphs() == before + num_shapes


@pytest.mark.timeout(400)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)], ids=str)
def test_so_is_that_of_hidden_tokens(batch: Any, dtype: torch.dtype, tolerance: float) -> None:
    facts = SampleFacts(8, 37)
    plain, compiled = MaskedLanguageModelling(facts), MaskedLanguageModelling(facts, compiles_loss=True)
    expected, gradients = _loss_and_gradients(plain, _model(plain, dtype), batch)
    model = _model(compiled, dtype)
    torch._dynamo.reset()
    before = _num_graphs()
    loss, own = _loss_and_gradients(compiled, model, batch)
    assert _num_graphs() == before + 1
    assert loss.dtype is torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=max(tolerance / 10, 1e-6))
    for name, gradient in gradients.items():
        # A key's bias changes no attention, so that its gradient is rounding.
        if gradient is not None and not name.endswith("key.bias"):
            assert own[name].dtype is dtype
            assert (own[name] - gradient).norm() <= tolerance * gradient.norm(), name
    with torch.no_grad():
        sums = [task.evaluate(task.forward(model.eval(), batch), batch) for task in (plain, compiled)]
    assert sums[1]["loss"].item() == pytest.approx(sums[0]["loss"].item(), rel=1e-5)
    assert _num_graphs() == before + 1


@pytest.mark.filterwarnings("ignore")
def test_there_may_be_any_number_of_shapes() -> None:
    compute = compiled_vocabulary_loss(backend="eager")
    torch._dynamo.reset()
    generator = torch.Generator().manual_seed(0)
    # torch gives up after eight.
    for length in range(3, 13):
        logits, labels = torch.randn(1, length, 7, generator=generator), torch.arange(length)[None] % 7
        expected = nn.functional.cross_entropy(logits[0], labels[0], reduction="sum")
        assert compute(logits, labels, 0.0).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(
    "task",
    [CausalLanguageModelling(compiles_loss=True), MaskedLanguageModelling(SampleFacts(8, 37), compiles_loss=True)],
    ids=lambda task: type(task).__name__,
)
def test_it_is_given_16_bit_logits_as_they_are(batch: Any, task: Task) -> None:
    model = _model(task, torch.bfloat16)
    cast_at_ends(model, torch.bfloat16)
    for is_training, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        logits = task.forward(model.train(is_training), batch).logits
        assert logits is not None
        assert logits.dtype is dtype
