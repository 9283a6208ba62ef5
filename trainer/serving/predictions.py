"""From a model's outputs to what a person reads: named classes and probabilities, numbers in their unit."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from trainer.data.row_arrays import StoredRow
from trainer.data.rows_manifest import RowRecipe
from trainer.deploy.signature import Deployment


class Predictor:
    """Makes predictions of a model's outputs."""

    def __init__(self, deployment: Deployment, recipe: RowRecipe) -> None:
        """Take what outputs mean.

        Args:
            deployment: the model.
            recipe: how rows are read, and the unit of labels that are numbers.
        """
        self._kind = deployment.output_kind
        self._classes = deployment.classes
        self._mean, self._scale = recipe.label_mean or 0.0, recipe.label_scale or 1.0

    def __call__(self, row: Any, stored: StoredRow, logits: np.ndarray) -> dict[str, Any]:
        """The prediction for a row.

        Args:
            row: in its form.
            stored: as training would store it.
            logits: its own, all finite; of tokens [length, outputs].
        """
        if self._kind == "number":
            return {"value": float(logits.reshape(())) * self._scale + self._mean}
        if self._kind == "values":
            return {"outputs": logits.tolist()}
        if self._kind == "binary" or (self._kind == "tags" and logits.shape[-1] == 1):
            # Of one logit, the log odds of the second class.
            logits = np.concatenate([np.zeros_like(logits), logits], axis=-1)
        probabilities = softmax(logits)
        if self._kind == "tags":
            return {"tags": self._tags(row.words, stored["word_starts"].tolist(), probabilities)}
        return {
            "class": self._classes[int(probabilities.argmax())],
            "probabilities": dict(zip(self._classes, probabilities.tolist(), strict=True)),
        }

    def _tags(self, words: Sequence[str], starts: Sequence[int], probabilities: np.ndarray) -> list[dict[str, Any]]:
        """The tag of each word, which is its first token's; none where the model did not read that far."""
        tags = []
        for word, start in zip(words, starts, strict=True):
            best = int(probabilities[start].argmax())
            found = (self._classes[best], float(probabilities[start, best])) if start >= 0 else (None, None)
            tags.append({"word": word, "tag": found[0], "probability": found[1]})
        return tags


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities in fp64, over the last axis."""
    scores = logits.astype(np.float64)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    probabilities: np.ndarray = weights / weights.sum(axis=-1, keepdims=True)
    return probabilities


def largest_rows(lengths: Sequence[int], num_outputs: int, max_bytes: int) -> int:
    """Rows of these lengths that may be computed together, for outputs [rows, longest, outputs] of fp32; at least 1."""
    return max(1, max_bytes // (max(lengths, default=1) * max(num_outputs, 1) * 4))
