"""From a model's outputs to what a person reads: named classes and probabilities, numbers in their unit."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from trainer.data.row_arrays import StoredRow
from trainer.data.rows_manifest import RowRecipe
from trainer.deploy.signature import Deployment

Predict = Callable[[Any, StoredRow, np.ndarray], dict[str, Any]]
"""Of a row in its form, as it is stored, and its logits, all finite, the prediction."""


def predictor(deployment: Deployment, recipe: RowRecipe | None) -> Predict:
    """What makes predictions of a model's outputs.

    Args:
        deployment: what outputs mean.
        recipe: how rows are read, and the unit of labels that are numbers.
    """
    classes = deployment.classes

    def by_class(row: Any, stored: StoredRow, logits: np.ndarray) -> dict[str, Any]:
        probabilities = softmax(logits)
        return {
            "class": classes[int(probabilities.argmax())],
            "probabilities": dict(zip(classes, probabilities.tolist(), strict=True)),
        }

    def by_odds(row: Any, stored: StoredRow, logits: np.ndarray) -> dict[str, Any]:
        # Of one logit, the log odds of the second class.
        return by_class(row, stored, np.array([0.0, float(logits.reshape(()))]))

    def by_word(row: Any, stored: StoredRow, logits: np.ndarray) -> dict[str, Any]:
        probabilities = softmax(logits)
        if len(classes) == 2 and logits.shape[-1] == 1:
            probabilities = softmax(np.concatenate([np.zeros_like(logits), logits], axis=-1))
        tags = []
        for word, start in zip(row.words, stored["word_starts"].tolist(), strict=True):
            best = None if start < 0 else int(probabilities[start].argmax())
            tags.append(
                {
                    "word": word,
                    "tag": None if best is None else classes[best],
                    "probability": None if best is None else float(probabilities[start, best]),
                }
            )
        return {"tags": tags}

    def number(row: Any, stored: StoredRow, logits: np.ndarray) -> dict[str, Any]:
        mean, scale = (recipe.label_mean or 0.0, recipe.label_scale or 1.0) if recipe is not None else (0.0, 1.0)
        return {"value": float(logits.reshape(())) * scale + mean}

    def values(row: Any, stored: StoredRow, logits: np.ndarray) -> dict[str, Any]:
        return {"outputs": logits.tolist()}

    return {"classes": by_class, "binary": by_odds, "tags": by_word, "number": number, "values": values}[
        deployment.output_kind
    ]


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities in fp64, over the last axis."""
    scores = logits.astype(np.float64)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    probabilities: np.ndarray = weights / weights.sum(axis=-1, keepdims=True)
    return probabilities


def largest_rows(lengths: Sequence[int], num_outputs: int, max_bytes: int) -> int:
    """Rows of these lengths that may be computed together, for outputs [rows, longest, outputs] of fp32; at least 1."""
    return max(1, max_bytes // (max(lengths, default=1) * max(num_outputs, 1) * 4))
