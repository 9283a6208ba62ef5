"""Samples as a user makes them, for tests: ``tests.trainer.data.own_samples:Points``."""

import os
from collections.abc import Sequence
from typing import Any

import torch

from trainer.data.facts import SampleFacts

# Set, it stands for a change of the code below.
EDITION_VARIABLE = "POINTS_EDITION"

_STARTS = {"train": 0, "validation": 10**6, "test": 2 * 10**6}


class Points:
    """Points in the plane, of the class of the quarter they are in."""

    def __init__(
        self, one_hot: bool = False, version: int = 1, num_validation: int = 11, length: int | None = None
    ) -> None:
        self.fingerprint = f"points {version}{os.environ.get(EDITION_VARIABLE, '')}"
        classes = ("one", "two", "three", "four")
        self.facts = SampleFacts(num_features=2, classes=classes, class_counts=(24,) * 4, sequence_length=length)
        self._one_hot = one_hot
        self._sizes = {"train": 97, "validation": num_validation, "test": 13}

    def num_samples(self, split: str) -> int:
        return self._sizes[split]

    def read(self, split: str, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        draws = [torch.Generator().manual_seed(_STARTS[split] + index) for index in indices]
        points = torch.stack([torch.randn(2, generator=draw) for draw in draws])
        labels = (points > 0).long() @ torch.tensor([1, 2])
        if self._one_hot:
            labels = torch.nn.functional.one_hot(labels, 4).float()
        return {"features": points, "labels": labels}


def nothing() -> list[Any]:
    """Forgets what it is asked for."""
    return []


def none_to_train_on() -> Points:
    """Has no training split."""
    points = Points()
    points._sizes["train"] = 0
    return points
