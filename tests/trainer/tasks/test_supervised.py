"""Classification and regression: losses against formulas, batches, metrics, and what is refused."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from sklearn import metrics as referee
from sklearn.utils.class_weight import compute_class_weight
from torch import nn

from sharding.engine import Batch
from sharding.ranks.errors import UserError
from trainer.config.sections import ModelConfig
from trainer.data.facts import SampleFacts
from trainer.data.samples import FILLER
from trainer.tasks.registry import build_task
from trainer.tasks.supervised import SupervisedTask
from trainer.tasks.task import Outputs

_TABLE = SampleFacts(num_features=5, classes=("a", "b", "c"), class_counts=(5, 2, 1))
_BINARY = SampleFacts(num_features=5, classes=("no", "yes"), class_counts=(6, 2))
_NUMBERS = SampleFacts(num_features=5, label_mean=100.0, label_scale=20.0)
_WORDS = SampleFacts(sequence_length=7, vocab_size=11, pad_token_id=0, classes=("a", "b", "c"))


def _logits(task: SupervisedTask, num_rows: int = 6) -> torch.Tensor:
    return 3 * torch.randn(num_rows, task.num_outputs, generator=torch.Generator().manual_seed(3))


def _labels(num_classes: int, num_rows: int = 6) -> torch.Tensor:
    labels = torch.arange(num_rows) % num_classes
    labels[-1] = -100
    return labels


def _loss(task: Any, logits: torch.Tensor, **batch: torch.Tensor) -> float:
    logits = logits.clone().requires_grad_()
    loss = task.loss(Outputs(logits=logits), batch)
    assert loss.dtype is torch.float32
    loss.backward()
    assert logits.grad is not None
    assert bool(logits.grad.isfinite().all())
    # What has no target gets no gradient.
    assert not logits.grad[-1].any()
    return loss.item()


def _by_hand(logits: torch.Tensor, targets: torch.Tensor, weights: list[float], smoothing: float) -> float:
    """The sum over rows and classes of weight x smoothed target x -log p."""
    log_p = logits.double().log_softmax(dim=1)
    smoothed = targets * (1 - smoothing) + smoothing / targets.shape[1]
    return float((-log_p * smoothed * torch.tensor(weights, dtype=torch.float64)).sum())


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_with_smoothing_and_one_hot_targets(smoothing: float) -> None:
    task: Any = build_task("classification", _TABLE, label_smoothing=smoothing)
    logits, labels = _logits(task), _labels(3)
    one_hot = nn.functional.one_hot(labels.clamp(min=0), 3).float()
    one_hot[-1] = 0
    expected = _by_hand(logits[:-1], one_hot[:-1].double(), [1.0, 1.0, 1.0], smoothing)
    assert _loss(task, logits, labels=labels) == pytest.approx(expected, rel=1e-6)
    assert _loss(task, logits, labels=one_hot) == pytest.approx(expected, rel=1e-6)
    soft = torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]]).repeat(3, 1)
    soft[-1] = 0
    assert _loss(task, logits, labels=soft) == pytest.approx(
        _by_hand(logits[:-1], soft[:-1].double(), [1.0, 1.0, 1.0], smoothing), rel=1e-6
    )
    assert task.num_targets({"labels": soft}) == task.num_targets({"labels": labels}) == 5


def test_class_weights() -> None:
    labels = _labels(3)
    one_hot = nn.functional.one_hot(labels[:-1], 3).double()
    given: Any = build_task("classification", _TABLE, class_weights=(1.0, 0.5, 2.0))
    logits = _logits(given)
    assert _loss(given, logits, labels=labels) == pytest.approx(
        _by_hand(logits[:-1], one_hot, [1, 0.5, 2], 0), rel=1e-6
    )
    # Summed over the very rows that were counted, balanced weights come to the number of rows.
    balanced: Any = build_task("classification", _TABLE, class_weights="balanced")
    rows = np.repeat([0, 1, 2], _TABLE.class_counts)
    weights = compute_class_weight("balanced", classes=np.arange(3), y=rows).tolist()
    assert sum(weights[row] for row in rows) == pytest.approx(len(rows))
    found = _loss(balanced, logits, labels=labels)
    assert found == pytest.approx(_by_hand(logits[:-1], one_hot, weights, 0), rel=1e-6)
    # Evaluation is without them.
    sums = balanced.evaluate(Outputs(logits=logits), {"labels": labels})
    assert float(sums["loss"]) == pytest.approx(_by_hand(logits[:-1], one_hot, [1, 1, 1], 0), rel=1e-6)


def test_binary_cross_entropy() -> None:
    task: Any = build_task("classification", _BINARY, loss="binary-cross-entropy", class_weights=(1.0, 3.0))
    assert task.num_outputs == 1
    logits, labels = _logits(task), _labels(2)
    by_torch = nn.functional.binary_cross_entropy_with_logits(
        logits[:-1, 0].double(), labels[:-1].double(), pos_weight=torch.tensor(3.0), reduction="sum"
    )
    assert _loss(task, logits, labels=labels) == pytest.approx(float(by_torch), rel=1e-6)
    metrics = task.metrics(task.evaluate(Outputs(logits=logits), {"labels": labels}))
    truth, taken = labels[:-1].numpy(), (logits[:-1, 0] > 0).long().numpy()
    assert metrics["accuracy"].value == referee.accuracy_score(truth, taken)
    assert metrics["f1/yes"].value == pytest.approx(referee.f1_score(truth, taken), rel=1e-12)
    assert metrics["auroc"].value == pytest.approx(referee.roc_auc_score(truth, logits[:-1, 0].numpy()), rel=1e-12)
    probabilities = logits[:-1, 0].double().sigmoid().numpy()
    assert metrics["loss"].value == pytest.approx(referee.log_loss(truth, probabilities), rel=1e-6)


def test_regression() -> None:
    task: Any = build_task("regression", _NUMBERS)
    samples = {"features": torch.zeros(6, 5), "categories": torch.zeros(6, 0, dtype=torch.long)}
    numbers = torch.tensor([100.0, 130.0, 90.0, 60.0, 100.5, 7.0])
    positions = torch.tensor([0, 1, 2, 3, 4, FILLER])
    batch = task.make_batch(samples | {"labels": numbers}, positions, training=True)
    assert sorted(batch) == ["features", "labels", "weights"]
    assert task.num_targets(batch) == 5
    logits = _logits(task)
    predictions = logits[:-1, 0].double().numpy() * 20 + 100
    truth = numbers[:-1].double().numpy()
    assert _loss(task, logits, **batch) == pytest.approx((((predictions - truth) / 20) ** 2).sum(), rel=1e-6)
    metrics = {name: m.value for name, m in task.metrics(task.evaluate(Outputs(logits=logits), batch)).items()}
    assert metrics == pytest.approx(
        {
            "loss": referee.mean_squared_error(truth / 20, predictions / 20),
            "mse": referee.mean_squared_error(truth, predictions),
            "mae": referee.mean_absolute_error(truth, predictions),
            "r2": referee.r2_score(truth, predictions),
        },
        rel=1e-6,
    )
    huber: Any = build_task("regression", _NUMBERS, loss="huber", huber_delta=0.5)
    errors = np.abs(predictions - truth) / 20
    expected = np.where(errors <= 0.5, errors**2 / 2, 0.5 * (errors - 0.25)).sum()
    assert _loss(huber, logits, **batch) == pytest.approx(expected, rel=1e-6)


def test_a_batch_of_texts() -> None:
    task: Any = build_task("sequence-classification", _WORDS)
    samples = {
        "input_ids": torch.tensor([[3, 4, 5], [6, 0, 0], [6, 0, 0]]),
        "num_tokens": torch.tensor([3, 1, 1]),
        "labels": torch.tensor([2, 1, 1]),
    }
    batch = task.make_batch(samples, torch.tensor([5, 6, FILLER]), training=False)
    assert batch["labels"].tolist() == [2, 1, -100]
    assert samples["labels"].tolist() == [2, 1, 1]
    assert task.num_targets(batch) == 2
    assert task.num_tokens(batch) == 5
    inputs = task.inputs(batch)
    assert inputs["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0], [1, 0, 0]]
    assert sorted(inputs) == ["attention_mask", "input_ids"]
    tags: Any = build_task("token-classification", _WORDS)
    samples["labels"] = torch.tensor([[2, -100, 1], [0, -100, -100], [0, -100, -100]])
    batch = tags.make_batch(samples, torch.tensor([5, 6, FILLER]), training=False)
    assert tags.num_targets(batch) == 3
    logits = torch.randn(3, 3, 3, generator=torch.Generator().manual_seed(1))
    metrics = tags.metrics(tags.evaluate(Outputs(logits=logits), batch))
    found = logits.argmax(dim=-1)
    assert metrics["accuracy"].value == referee.accuracy_score([2, 1, 0], [found[0, 0], found[0, 2], found[1, 0]])
    assert "auroc" not in metrics


_ARCHITECTURES: dict[str, dict[str, Any]] = {
    "bert": {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 3},
    "llama": {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 3},
}


@pytest.mark.parametrize("architecture", _ARCHITECTURES)
@pytest.mark.parametrize("name", ["sequence-classification", "token-classification", "regression"])
def test_models_of_transformers(architecture: str, name: str) -> None:
    task: Any = build_task(name, _WORDS)
    settings = ModelConfig(architecture=architecture, config=_ARCHITECTURES[architecture])
    torch.manual_seed(0)
    model = task.build_model(settings, _WORDS).eval()
    lengths = torch.tensor([7, 3, 5])
    samples: Batch = {"input_ids": torch.randint(1, 11, (3, 7)), "num_tokens": lengths}
    samples["input_ids"][torch.arange(7) >= lengths[:, None]] = 0
    samples["labels"] = {"token-classification": torch.zeros(3, 7).long(), "regression": torch.zeros(3)}.get(
        name, torch.zeros(3).long()
    )
    batch = task.make_batch(samples, torch.arange(3), training=True)
    with torch.no_grad():
        logits = task.forward(model, batch).logits
        # Padding changes nothing: the short row alone gives the same.
        alone = {key: column[1:2, :3] if column.ndim > 1 else column[1:2] for key, column in batch.items()}
        short = task.forward(model, alone).logits
    shape = (3, 7, 3) if name == "token-classification" else (3, 1 if name == "regression" else 3)
    assert logits.shape == shape
    expected = logits[1:2, :3] if name == "token-classification" else logits[1:2]
    assert torch.allclose(short, expected, atol=1e-6)


class _Wide(nn.Module):
    """Predicts something else than is asked for."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(UserError, match=r"tells classes apart, but labels name none"):
        build_task("classification", SampleFacts(num_features=2))
    with pytest.raises(UserError, match=r"labels name one alone, cat"):
        build_task("image-classification", SampleFacts(classes=("cat",)))
    with pytest.raises(UserError, match=r"tells two classes apart, but there are 3"):
        build_task("classification", _TABLE, loss="binary-cross-entropy")
    with pytest.raises(UserError, match=r"has 2 weights for 3 classes; write one for each of a, b, c"):
        build_task("classification", _TABLE, class_weights=(1.0, 2.0))
    absent = SampleFacts(classes=("a", "b"), class_counts=(3, 0))
    with pytest.raises(UserError, match=r"balanced divides by .* there are none of b"):
        build_task("classification", absent, class_weights="balanced")
    task: Any = build_task("classification", _TABLE)
    with pytest.raises(UserError, match=r"reads tables, which no model of transformers does"):
        task.build_model(ModelConfig(architecture="bert"), _TABLE)
    batch = {"features": torch.zeros(4, 5), "labels": torch.zeros(4).long()}
    with pytest.raises(UserError, match=r"have shape \[4, 5\], and task.name=classification needs \[4, 3\]"):
        task.forward(_Wide(), batch)
    words: Any = build_task("sequence-classification", _WORDS)
    with pytest.raises(UserError, match=r"no head for sequence-classification"):
        words.build_model(ModelConfig(architecture="mamba"), _WORDS)


def test_scores_do_not_lose_what_cannot_be_scored() -> None:
    """A model whose logits are not finite has no area, and counts as wrong or right as argmax has it."""
    task: Any = build_task("classification", _BINARY)
    logits = torch.full((4, 2), math.nan)
    metrics = task.metrics(task.evaluate(Outputs(logits=logits), {"labels": torch.tensor([0, 1, 0, 1])}))
    assert math.isnan(metrics["loss"].value)
    assert math.isnan(metrics["auroc"].value)


def test_texts_are_filled_up_with_what_the_model_takes_for_padding() -> None:
    facts = SampleFacts(sequence_length=7, vocab_size=11, classes=("a", "b", "c"))
    task: Any = build_task("sequence-classification", facts)
    sizes = {"hidden_size": 12, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    settings = ModelConfig(architecture="llama", config=sizes | {"num_key_value_heads": 2, "pad_token_id": 9})
    model = task.build_model(settings, facts).eval()
    # As rows are filled up where their tokenizer has no such token.
    ids = torch.tensor([[3, 0, 0, 0, 0], [4, 5, 6, 0, 0], [1, 2, 3, 4, 5]])
    samples = {"input_ids": ids, "num_tokens": torch.tensor([1, 4, 5]), "labels": torch.tensor([0, 1, 2])}
    batch = task.make_batch(samples, torch.arange(3), training=True)
    assert batch["input_ids"].tolist() == [[3, 9, 9, 9, 9], [4, 5, 6, 0, 9], [1, 2, 3, 4, 5]]
    with torch.no_grad():
        together = task.forward(model, batch).logits
        for row, count in enumerate((1, 4, 5)):
            assert torch.allclose(model(input_ids=ids[row : row + 1, :count]).logits[0], together[row], atol=1e-6)
