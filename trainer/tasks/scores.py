"""Scores of a split, from sums over its samples: pure functions, fp64.

What metrics follow from is added up over micro-batches and ranks, so scores do not depend on either. What follows from
no sum is kept by sample (``Task.kept``): the scores that a ROC curve is drawn from, and nothing else.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from trainer.tasks.next_tokens import IGNORED_LABEL

MAX_CONFUSED_CLASSES = 100
"""Classes up to which the whole confusion matrix is summed, and scores of single classes are metrics."""

MAX_RANKED_CLASSES = 32
"""Classes up to which the area under the ROC curve is computed, which keeps a score for each sample and class."""


@dataclass(frozen=True)
class ClassScores:
    """Scores of one class against all others.

    Attributes:
        precision: share of what was taken for this class that is of it; 0 where nothing was.
        recall: share of what is of this class that was taken for it; 0 where nothing is.
        f1: harmonic mean of both; 0 where both are.
        num_samples: samples of this class.
        num_predicted: samples that were taken for it.
    """

    precision: float
    recall: float
    f1: float
    num_samples: int
    num_predicted: int


def class_sums(predictions: torch.Tensor, labels: torch.Tensor, num_classes: int) -> dict[str, torch.Tensor]:
    """What all scores of a classification follow from.

    Args:
        predictions: class that each target was taken for, int64 of any shape.
        labels: its true class, int64 of the same shape; -100 where there is no target.
        num_classes: number of classes.

    Returns:
        ``confusion``, [classes, classes] with the true class as the row; of many classes ``hits``, ``predicted`` and
        ``actual`` alone, [classes]: its diagonal and the sums of its columns and rows.
    """
    predictions, labels = predictions.flatten(), labels.flatten()
    counted = (labels != IGNORED_LABEL).double()
    # Its place does not matter where nothing is counted.
    labels = labels.clamp(min=0)

    def counts(index: torch.Tensor, weights: torch.Tensor, length: int) -> torch.Tensor:
        return torch.zeros(length, dtype=torch.float64, device=index.device).scatter_add_(0, index, weights)

    if num_classes <= MAX_CONFUSED_CLASSES:
        pairs = counts(labels * num_classes + predictions, counted, num_classes**2)
        return {"confusion": pairs.view(num_classes, num_classes)}
    return {
        "hits": counts(labels, counted * (labels == predictions), num_classes),
        "predicted": counts(predictions, counted, num_classes),
        "actual": counts(labels, counted, num_classes),
    }


def scores_by_class(sums: Mapping[str, torch.Tensor]) -> list[ClassScores]:
    """Scores of each class, from ``class_sums``."""
    hits, predicted, actual = _marginals(sums)
    precision, recall = _ratio(hits, predicted), _ratio(hits, actual)
    f1 = _ratio(2 * hits, predicted + actual)
    columns = (precision.tolist(), recall.tolist(), f1.tolist(), actual.long().tolist(), predicted.long().tolist())
    return [ClassScores(*values) for values in zip(*columns, strict=True)]


def classification_scores(sums: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """``accuracy``, and ``precision``, ``recall`` and ``f1`` over classes, from ``class_sums``.

    ``_macro`` is the mean over classes that some sample is of or was taken for, as scikit-learn has it: a class that a
    small split lacks does not count as one that was never found. ``_micro`` counts all decisions of all classes, which
    comes to the accuracy.
    """
    hits, predicted, actual = _marginals(sums)
    occurs = (predicted + actual) > 0
    num_classes = max(int(occurs.sum()), 1)

    def macro(numerator: torch.Tensor, denominator: torch.Tensor) -> float:
        return float(_ratio(numerator, denominator)[occurs].sum()) / num_classes

    num_targets, num_hits = float(actual.sum()), float(hits.sum())
    return {
        "accuracy": num_hits / max(num_targets, 1.0),
        "precision_macro": macro(hits, predicted),
        "recall_macro": macro(hits, actual),
        "f1_macro": macro(2 * hits, predicted + actual),
        "f1_micro": 2 * num_hits / max(num_targets + float(predicted.sum()), 1.0),
    }


def auroc(scores: torch.Tensor, is_positive: torch.Tensor) -> float:
    """Area under the ROC curve: how often a positive sample's score is above a negative one's, ties being half.

    Exact, from ranks. NaN where there are no samples of both kinds, or a score is not finite.

    Args:
        scores: of each sample, [samples].
        is_positive: whether it is one, bool [samples].
    """
    num_positive = int(is_positive.sum())
    num_negative = len(scores) - num_positive
    if not num_positive or not num_negative or not bool(scores.isfinite().all()):
        return math.nan
    _, places, counts = torch.unique(scores, return_inverse=True, return_counts=True)
    # Ranks count from 1; equal scores share their mean.
    ranks = counts.cumsum(0).double() - (counts - 1) / 2
    rank_sum = float(ranks[places][is_positive].sum())
    return (rank_sum - num_positive * (num_positive + 1) / 2) / (num_positive * num_negative)


def auroc_over_classes(probabilities: torch.Tensor, labels: torch.Tensor) -> float:
    """Area under the ROC curve: of two classes that of the second, of more the mean of each against all others.

    Classes without a sample, or without one of another class, are left out of the mean.

    Args:
        probabilities: of each class, [samples, classes]; or that of the second of two alone, [samples, 1].
        labels: true class of each sample, [samples]; -100 where there is no target.
    """
    counted = labels != IGNORED_LABEL
    probabilities, labels = probabilities[counted], labels[counted]
    if probabilities.shape[1] == 1:
        return auroc(probabilities[:, 0], labels == 1)
    areas = [auroc(of_class, labels == index) for index, of_class in enumerate(probabilities.T)]
    has_both = [0 < int((labels == index).sum()) < len(labels) for index in range(len(areas))]
    kept = [area for area, both in zip(areas, has_both, strict=True) if both]
    return sum(kept) / len(kept) if kept else math.nan


def regression_sums(predictions: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> dict[str, torch.Tensor]:
    """What all scores of a regression follow from.

    Args:
        predictions: [samples].
        targets: of the same shape, counted from near their mean: squares of what is far from zero lose the deviations.
        weights: 1 where a sample counts and 0 where it does not.

    Returns:
        ``samples``, ``absolute_error``, ``squared_error``, ``target`` and ``squared_target``, scalars.
    """
    counted = weights > 0
    targets = torch.where(counted, targets.double(), 0.0)
    errors = torch.where(counted, predictions.double(), 0.0) - targets
    return {
        "samples": counted.double().sum(),
        "absolute_error": errors.abs().sum(),
        "squared_error": errors.square().sum(),
        "target": targets.sum(),
        "squared_target": targets.square().sum(),
    }


def regression_scores(sums: Mapping[str, torch.Tensor], scale: float = 1.0) -> dict[str, float]:
    """Mean squared and absolute error, ``mse`` and ``mae``, and the coefficient of determination, ``r2``.

    R2 of targets that are all alike is 1 without error and else 0; of less than two samples it is NaN.

    Args:
        sums: from ``regression_sums``.
        scale: what one unit of the sums is in the unit of the scores.
    """
    number = float(sums["samples"])
    squared_error, target = float(sums["squared_error"]), float(sums["target"])
    # Rounding alone makes it negative.
    deviations = max(float(sums["squared_target"]) - target**2 / max(number, 1.0), 0.0)
    if number < 2:
        r2 = math.nan
    elif deviations == 0.0:
        r2 = float(squared_error == 0.0)
    else:
        r2 = 1.0 - squared_error / deviations
    return {
        "mse": squared_error * scale**2 / max(number, 1.0),
        "mae": float(sums["absolute_error"]) * scale / max(number, 1.0),
        "r2": r2,
    }


def perplexity(mean_loss: float) -> float:
    """The exponential of a mean loss in nats; infinite where a float cannot hold it."""
    # exp overflows a float beyond 709; such a model has no useful perplexity.
    return math.exp(mean_loss) if mean_loss < 700 else math.inf


def bits_per_byte(loss_sum: float, num_bytes: float) -> float:
    """Summed loss in nats over the bytes of text that the targets stand for; NaN where there are none.

    Comparable between tokenizers, which perplexity is not.
    """
    return loss_sum / math.log(2) / num_bytes if num_bytes else math.nan


def _marginals(sums: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rightly taken, taken and actual samples by class, [classes] each."""
    if "confusion" in sums:
        matrix = sums["confusion"]
        return matrix.diagonal(), matrix.sum(dim=0), matrix.sum(dim=1)
    return sums["hits"], sums["predicted"], sums["actual"]


def _ratio(numerator: torch.Tensor, denominator: torch.Tensor) -> torch.Tensor:
    """Quotients; 0 where nothing is divided by nothing."""
    return numerator / denominator.clamp(min=1.0)
