"""Tasks on packed tokens with different heads on one body, for tests of new heads."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from sharding.engine import Batch
from trainer.architectures.auto_model import auto_model
from trainer.config.sections import ModelConfig
from trainer.data.facts import SampleFacts
from trainer.data.samples import FILLER
from trainer.tasks.causal_lm import CausalLanguageModelling
from trainer.tasks.task import Outputs, Sums


class Copying(CausalLanguageModelling):
    """Each token is its own label, for a masked-LM head."""

    def build_model(self, model_settings: ModelConfig, facts: SampleFacts) -> nn.Module:
        model: nn.Module = auto_model("masked-lm", model_settings, facts)
        return model

    def make_batch(self, samples: Batch, positions: torch.Tensor, training: bool) -> Batch:
        batch = super().make_batch(samples, positions, training)
        return batch | {"labels": torch.where((positions == FILLER)[:, None], -100, batch["input_ids"])}


class ParityOfFirst(CausalLanguageModelling):
    """Whether the first token is even, for a classifier of two or of more classes."""

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__()
        self._num_classes = int(options.get("classes", 2))

    def build_model(self, model_settings: ModelConfig, facts: SampleFacts) -> nn.Module:
        model: nn.Module = auto_model("sequence-classification", model_settings, facts, self._num_classes)
        return model

    def make_batch(self, samples: Batch, positions: torch.Tensor, training: bool) -> Batch:
        tokens = super().make_batch(samples, positions, training)["input_ids"]
        return {"input_ids": tokens, "labels": torch.where(positions == FILLER, -100, tokens[:, 0] % 2)}

    def forward(self, model: nn.Module, batch: Batch) -> Outputs:
        return Outputs(logits=model(input_ids=batch["input_ids"]).logits.float())

    def loss(self, outputs: Outputs, batch: Batch) -> torch.Tensor:
        assert outputs.logits is not None
        return functional.cross_entropy(outputs.logits, batch["labels"], reduction="sum")

    def evaluate(self, outputs: Outputs, batch: Batch) -> Sums:
        return {"loss": self.loss(outputs, batch).double(), "targets": (batch["labels"] >= 0).sum().double()}
