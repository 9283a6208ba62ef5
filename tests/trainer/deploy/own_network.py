"""A model, a task and samples of a user's own, for tests: ``tests.trainer.deploy.own_network:NAME``."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from sharding.engine import Batch
from trainer.architectures.networks import build_network
from trainer.data.facts import SampleFacts
from trainer.data.samples import FILLER
from trainer.tasks.task import Metric, Outputs, Sums, Task


class Pairs:
    """Two vectors and whether their product is above zero."""

    fingerprint = "pairs 1"
    facts = SampleFacts(num_features=6)

    def num_samples(self, split: str) -> int:
        return {"train": 64, "validation": 33, "test": 0}[split]

    def read(self, split: str, indices: Sequence[int]) -> Batch:
        start = {"train": 0, "validation": 10**6}[split]
        draws = [torch.Generator().manual_seed(start + index) for index in indices]
        left = torch.stack([torch.randn(6, generator=draw) for draw in draws])
        right = torch.stack([torch.randn(6, generator=draw) for draw in draws])
        return {"left": left, "right": right, "labels": ((left * right).sum(dim=1) > 0).float()}


class _Bilinear(nn.Module):
    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(num_features, 5)])

    def forward(self, left: torch.Tensor, right: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return (self.layers[0](left) * self.layers[0](right)).sum(dim=-1) * scale


def network(*, facts: SampleFacts, num_outputs: int | None) -> nn.Module:
    assert facts.num_features is not None
    return _Bilinear(facts.num_features)


class Counting(nn.Module):
    """Says in Python how large its input is, which no trace can hold."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.inner = _Bilinear(num_features)

    def forward(self, left: torch.Tensor, right: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        made: torch.Tensor = self.inner(left, right, scale)
        return made if float(left.sum()) > 1e9 else made * 1.0


def counting(*, facts: SampleFacts, num_outputs: int | None) -> nn.Module:
    assert facts.num_features is not None
    return Counting(facts.num_features)


class Decomposing(_Bilinear):
    """Can be traced, but ONNX has no such operation."""

    def forward(self, left: torch.Tensor, right: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        made: torch.Tensor = super().forward(left, right, scale)
        return made + torch.linalg.eigvalsh(left[:, :, None] * left[:, None, :]).sum(dim=-1)


def decomposing(*, facts: SampleFacts, num_outputs: int | None) -> nn.Module:
    assert facts.num_features is not None
    return Decomposing(facts.num_features)


class IsAbove(Task):
    """Calls its model by position, and with a number beside."""

    def build_model(self, model_settings: Any, facts: SampleFacts) -> nn.Module:
        return build_network(model_settings, facts, None)

    def make_batch(self, samples: Batch, positions: torch.Tensor, training: bool) -> Batch:
        return {**samples, "weights": (positions != FILLER).float()}

    def inputs(self, batch: Batch) -> Batch:
        return {"left": batch["left"], "right": batch["right"]}

    def forward(self, model: nn.Module, batch: Batch) -> Outputs:
        return Outputs(logits=model(batch["left"], right=batch["right"], scale=2.0).float())

    def loss(self, outputs: Outputs, batch: Batch) -> torch.Tensor:
        assert outputs.logits is not None
        labels, weights = batch["labels"], batch["weights"]
        return functional.binary_cross_entropy_with_logits(outputs.logits, labels, weights, reduction="sum")

    def evaluate(self, outputs: Outputs, batch: Batch) -> Sums:
        return {"loss": self.loss(outputs, batch).double(), "targets": batch["weights"].sum().double()}

    def num_targets(self, batch: Batch) -> int:
        return int(batch["weights"].sum())

    def num_tokens(self, batch: Batch) -> int:
        return len(batch["left"])

    def metrics(self, sums: Mapping[str, torch.Tensor]) -> dict[str, Metric]:
        return {"loss": Metric(float(sums["loss"] / sums["targets"]), "lower")}
