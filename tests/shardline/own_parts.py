"""A run's parts of one's own, such as a script has them."""

from typing import Any

import torch
from torch import nn

import shardline
from shardline import Outputs
from trainer.tasks.classification import Classification


class Points:
    """Points in the plane, of class 1 where both numbers have one sign."""

    def __init__(self, num_train: int = 96, fails_at: int = -1) -> None:
        self.fingerprint = f"points, {num_train}"
        self.facts = shardline.SampleFacts(num_features=2, classes=("unlike", "alike"))
        self._num_samples = {"train": num_train, "validation": 40, "test": 13}
        self._fails_at = fails_at

    def num_samples(self, split: str) -> int:
        return self._num_samples[split]

    def read(self, split: str, indices: Any) -> dict[str, torch.Tensor]:
        if split == "train" and self._fails_at in indices:
            raise RuntimeError(f"sample {self._fails_at} cannot be read")
        start = {"train": 0, "validation": 10**6, "test": 2 * 10**6}[split]
        points = torch.stack([torch.randn(2, generator=torch.Generator().manual_seed(start + i)) for i in indices])
        return {"features": points, "labels": (points.prod(dim=1) > 0).long()}


class Network(nn.Module):
    def __init__(self, *, facts: Any, num_outputs: int, width: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(facts.num_features, width), nn.Linear(width, num_outputs)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(features).relu())


class Halved(Classification):
    """Whose loss nobody else has."""

    def loss(self, outputs: Outputs, batch: Any) -> torch.Tensor:
        return super().loss(outputs, batch) / 2


class Listener(shardline.Observer):
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.evaluated: list[tuple[int, list[str]]] = []
        self.saved: list[tuple[int, str]] = []

    def on_step(self, step: int, metrics: Any) -> None:
        assert metrics["train/loss"] > 0
        self.steps.append(step)

    def on_evaluate(self, step: int, metrics: Any) -> None:
        assert all(name.startswith("eval/") for name in metrics)
        self.evaluated.append((step, sorted(metrics)[:1]))

    def on_save(self, step: int, folder: Any) -> None:
        # Not before it can be continued from.
        assert (folder / "manifest.json").exists()
        self.saved.append((step, folder.name))


class Clumsy(Listener):
    """Fails at the second step that it hears of."""

    def on_step(self, step: int, metrics: Any) -> None:
        super().on_step(step, metrics)
        if len(self.steps) == 2:
            raise KeyError("no such metric")


def settings(root: Any, name: str, **sections: Any) -> dict[str, Any]:
    """Of a run of these parts, without them."""
    values: dict[str, Any] = {
        "name": name,
        "steps": 6,
        "output_dir": root / "runs",
        "task": {"name": "classification"},
        "model": {"arguments": {"width": 8}},
        "data": {"cache_dir": root / "cache"},
        "batch": {"global_size": 12, "micro_size": 3},
        "optimizer": {"lr": 3e-2},
        "metrics": {"every_steps": 2},
        "evaluation": {"every_steps": 3},
        "checkpoint": {"every_steps": 3, "keep_last": 0},
        "tracking": {"wandb": {"mode": "disabled"}},
    }
    return values | {key: {**values.get(key, {}), **value} for key, value in sections.items()}
