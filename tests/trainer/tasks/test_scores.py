"""Scores from sums and kept samples against scikit-learn, whatever the shares of batches and ranks are."""

import math
import warnings
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from sklearn import metrics as referee

from sharding.engine import Batch
from trainer.tasks.named_sums import NamedSums
from trainer.tasks.scores import (
    MAX_CONFUSED_CLASSES,
    auroc,
    auroc_over_classes,
    bits_per_byte,
    class_sums,
    classification_scores,
    perplexity,
    regression_scores,
    regression_sums,
    scores_by_class,
)
from trainer.tasks.task import Sums

_FILLER = -100
# Rows of each rank's batches of four; -1 is a rank without any row.
_SHARES = {
    "one rank": [[4, 4, 4, 4, 3]],
    "two, uneven": [[4, 4, 4], [4, 3, 0]],
    "three, one empty": [[4, 4], [4, 4], [3, 0], [0, 0]],
}
_NUM_ROWS = 19


class _Given:
    """A task's part that sums what a batch holds."""

    kept = frozenset({"scored"})

    def forward(self, model: object, batch: Batch) -> Batch:
        return batch

    def evaluate(self, outputs: Batch, batch: Batch) -> Sums:
        logits, labels, targets = batch["logits"], batch["labels"], batch["targets"]
        probabilities = logits.double().softmax(dim=1)
        is_target = labels != _FILLER
        return (
            class_sums(logits.argmax(dim=1), labels, logits.shape[1])
            | regression_sums(batch["predictions"], targets, is_target)
            | {"scored": torch.cat([probabilities, labels[:, None]], dim=1)}
        )


def _sums(columns: Mapping[str, torch.Tensor], shares: list[list[int]]) -> Sums:
    """What all ranks have together, each with batches of four rows that fillers fill up."""
    named, first, of_ranks = NamedSums(_Given()), 0, []  # type: ignore[arg-type]
    num_batches = max(map(len, shares))
    for of_rank in shares:
        vectors = []
        for num_rows in of_rank + [0] * (num_batches - len(of_rank)):
            index = torch.arange(first, first + 4).clamp(max=_NUM_ROWS - 1)
            batch = {name: column[index].clone() for name, column in columns.items()}
            batch["labels"][num_rows:] = _FILLER
            batch["targets"][num_rows:] = math.nan
            vectors.append(named(torch.nn.Identity(), batch))
            first += num_rows
        of_ranks.append(named.total(vectors))
    assert first == _NUM_ROWS
    return named.by_name(torch.stack(of_ranks))


def _columns(num_classes: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(num_classes)
    return {
        # Some scores are equal.
        "logits": torch.randint(-3, 4, (_NUM_ROWS, num_classes), generator=generator).float(),
        "labels": torch.randint(0, num_classes, (_NUM_ROWS,), generator=generator),
        "targets": torch.randn(_NUM_ROWS, generator=generator),
        "predictions": torch.randn(_NUM_ROWS, generator=generator),
    }


@pytest.mark.parametrize("shares", _SHARES.values(), ids=_SHARES.keys())
@pytest.mark.parametrize("num_classes", [2, 4, MAX_CONFUSED_CLASSES + 1])
def test_classification(shares: list[list[int]], num_classes: int) -> None:
    columns = _columns(num_classes)
    sums = _sums(columns, shares)
    assert sums["samples"] == _NUM_ROWS
    assert ("confusion" in sums) == (num_classes <= MAX_CONFUSED_CLASSES)
    labels, predicted = columns["labels"].numpy(), columns["logits"].argmax(dim=1).numpy()
    expected = {"accuracy": referee.accuracy_score(labels, predicted)}
    for average in ("macro", "micro"):
        scores = referee.precision_recall_fscore_support(labels, predicted, average=average, zero_division=0)
        names = ("precision", "recall", "f1") if average == "macro" else (None, None, "f1")
        expected |= {f"{name}_{average}": score for name, score in zip(names, scores[:3], strict=True) if name}
    assert classification_scores(sums) == pytest.approx(expected, rel=1e-12)
    by_class = referee.precision_recall_fscore_support(
        labels, predicted, labels=range(num_classes), average=None, zero_division=0
    )
    found = [(s.precision, s.recall, s.f1, s.num_samples) for s in scores_by_class(sums)]
    assert np.array(found) == pytest.approx(np.array(by_class).T, rel=1e-12)
    if "confusion" in sums:
        matrix = referee.confusion_matrix(labels, predicted, labels=range(num_classes))
        assert sums["confusion"].tolist() == matrix.tolist()


@pytest.mark.parametrize("shares", _SHARES.values(), ids=_SHARES.keys())
def test_area_under_the_roc_curve(shares: list[list[int]]) -> None:
    for num_classes in (2, 4):
        columns = _columns(num_classes)
        scored = _sums(columns, shares)["scored"]
        assert len(scored) > _NUM_ROWS
        probabilities = columns["logits"].double().softmax(dim=1).numpy()
        labels = columns["labels"].numpy()
        expected = (
            referee.roc_auc_score(labels, probabilities[:, 1])
            if num_classes == 2
            else referee.roc_auc_score(labels, probabilities, multi_class="ovr", average="macro")
        )
        assert auroc_over_classes(scored[:, :-1], scored[:, -1]) == pytest.approx(expected, abs=1e-12)
        if num_classes == 2:
            assert auroc_over_classes(scored[:, 1:2], scored[:, -1]) == pytest.approx(expected, abs=1e-12)


def test_an_area_that_is_none() -> None:
    scores = torch.tensor([0.1, 0.2, 0.3])
    assert math.isnan(auroc(scores, torch.tensor([True, True, True])))
    assert math.isnan(auroc(scores / 0, torch.tensor([True, False, True])))
    assert auroc(torch.zeros(5), torch.arange(5) < 2) == 0.5
    # A class that no sample is of does not count.
    probabilities = torch.tensor([[0.8, 0.1, 0.1], [0.1, 0.5, 0.4], [0.2, 0.7, 0.1]])
    assert auroc_over_classes(probabilities, torch.tensor([0, 0, 1])) == 0.75


@pytest.mark.parametrize("shares", _SHARES.values(), ids=_SHARES.keys())
def test_regression(shares: list[list[int]]) -> None:
    columns = _columns(3)
    # Far from zero, as people have them, and counted from their mean, as sums need them.
    scale, mean = 50.0, 1e6
    targets, predictions = (columns[n].double().numpy() * scale + mean for n in ("targets", "predictions"))
    expected = {
        "mse": referee.mean_squared_error(targets, predictions),
        "mae": referee.mean_absolute_error(targets, predictions),
        "r2": referee.r2_score(targets, predictions),
    }
    assert regression_scores(_sums(columns, shares), scale) == pytest.approx(expected, rel=1e-9)


def test_r2_of_targets_that_are_alike() -> None:
    for predictions in ([3.0, 3.0], [3.0, 4.0]):
        sums = regression_sums(torch.tensor(predictions), torch.tensor([3.0, 3.0]), torch.ones(2))
        assert regression_scores(sums)["r2"] == referee.r2_score([3.0, 3.0], predictions)
    alone = regression_sums(torch.tensor([1.0, math.nan]), torch.tensor([3.0, math.nan]), torch.tensor([1.0, 0.0]))
    scores = regression_scores(alone)
    assert math.isnan(scores.pop("r2"))
    assert scores == {"mse": 4.0, "mae": 2.0}


def test_perplexity_and_bits() -> None:
    assert perplexity(2.0) == math.exp(2.0)
    assert perplexity(800.0) == math.inf
    # A loss of log 256 nats for each byte is 8 bits.
    assert bits_per_byte(10 * math.log(256), 10) == pytest.approx(8.0, rel=1e-15)
    assert math.isnan(bits_per_byte(1.0, 0.0))


def test_nothing_is_scored_without_samples() -> None:
    sums = class_sums(torch.tensor([1, 0]), torch.tensor([_FILLER, _FILLER]), 2)
    assert set(classification_scores(sums).values()) == {0.0}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert math.isnan(auroc_over_classes(torch.ones(2, 1), torch.tensor([_FILLER, _FILLER])))
