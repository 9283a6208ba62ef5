"""A task on rows as a user writes it, for tests: ``tests.trainer.tasks.own_row_task:ClassifiesTexts``."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import AutoModelForSequenceClassification

from sharding.engine import Batch
from trainer.architectures.config import build_model_config
from trainer.data.samples import FILLER
from trainer.tasks.task import Metric, Outputs, Sums, Task

MODEL = {
    "architecture": "bert",
    "config": {
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    },
}


class ClassifiesTexts(Task):
    """Learns the class of a text; writes the shape of each batch into the folder of its options."""

    def __init__(self, options: Any, facts: Any) -> None:
        self._folder = options.get("folder")
        self._facts = facts

    def build_model(self, model_settings: Any, facts: Any) -> nn.Module:
        config = build_model_config(model_settings, facts)
        config.num_labels = len(facts.classes)
        return AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)

    def make_batch(self, samples: Batch, positions: torch.Tensor, training: bool) -> Batch:
        if self._folder and training:
            with (Path(self._folder) / f"rank-{os.environ.get('RANK', '0')}.jsonl").open("a") as file:
                file.write(
                    json.dumps({"lengths": samples["num_tokens"].tolist(), "positions": positions.tolist()}) + "\n"
                )
        mask = torch.arange(samples["input_ids"].shape[1]) < samples["num_tokens"][:, None]
        labels = torch.where(positions == FILLER, -100, samples["labels"])
        return {"input_ids": samples["input_ids"], "attention_mask": mask.long(), "labels": labels}

    def inputs(self, batch: Batch) -> Batch:
        return {name: batch[name] for name in ("input_ids", "attention_mask")}

    def forward(self, model: nn.Module, batch: Batch) -> Outputs:
        return Outputs(logits=model(**self.inputs(batch)).logits.float())

    def loss(self, outputs: Outputs, batch: Batch) -> torch.Tensor:
        return functional.cross_entropy(outputs.logits, batch["labels"], reduction="sum")

    def evaluate(self, outputs: Outputs, batch: Batch) -> Sums:
        is_counted = batch["labels"] != -100
        is_right = (outputs.logits.argmax(dim=-1) == batch["labels"]) & is_counted
        return {
            "loss": self.loss(outputs, batch).double(),
            "right": is_right.sum().double(),
            "n": is_counted.sum().double(),
        }

    def num_targets(self, batch: Batch) -> int:
        return int((batch["labels"] != -100).sum())

    def num_tokens(self, batch: Batch) -> int:
        return int(batch["attention_mask"].sum())

    def metrics(self, sums: Mapping[str, torch.Tensor]) -> dict[str, Metric]:
        return {
            "loss": Metric(float(sums["loss"] / sums["n"]), "lower"),
            "accuracy": Metric(float(sums["right"] / sums["n"]), "higher"),
        }
