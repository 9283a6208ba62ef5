"""Built-in networks under engines, for tests that run inside a process group: a task, samples, and their shares."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from sharding.engine import Batch, Engine
from sharding.mesh import build_mesh
from sharding.ranks.process_group import Ranks
from trainer.architectures.networks import build_network
from trainer.config import RunConfig, parse_config
from trainer.config.sections import ModelConfig
from trainer.data.facts import SampleFacts
from trainer.data.samples import FILLER
from trainer.model.engine import build_model_engine
from trainer.tasks.task import Metric, Outputs, Sums, Task

NUM_CLASSES = 3
IMAGES = SampleFacts(image_shape=(1, 8, 8))
TABLE = SampleFacts(num_features=6)
TEXTS = SampleFacts(sequence_length=9, vocab_size=23)
RATINGS = SampleFacts(num_features=2, categories=(("user", 7), ("item", 9)))


class RowClassification(Task):
    """One class of each row; label -100 where there is none."""

    def __init__(self, facts: SampleFacts | None = None) -> None:
        self._num_classes = len(facts.classes) if facts is not None and facts.classes else NUM_CLASSES

    def build_model(self, model_settings: ModelConfig, facts: SampleFacts) -> nn.Module:
        return build_network(model_settings, facts, self._num_classes)

    def make_batch(self, samples: Batch, positions: torch.Tensor, training: bool) -> Batch:
        batch = {name: tensor for name, tensor in samples.items() if name != "num_tokens" and tensor.shape[-1]}
        if "num_tokens" in samples:
            columns = torch.arange(samples["input_ids"].shape[1])
            batch["attention_mask"] = (columns < samples["num_tokens"][:, None]).long()
        return batch | {"labels": torch.where(positions == FILLER, -100, samples["labels"])}

    def inputs(self, batch: Batch) -> Batch:
        return {name: tensor for name, tensor in batch.items() if name != "labels"}

    def forward(self, model: nn.Module, batch: Batch) -> Outputs:
        return Outputs(logits=model(**self.inputs(batch)).float())

    def loss(self, outputs: Outputs, batch: Batch) -> torch.Tensor:
        assert outputs.logits is not None
        return functional.cross_entropy(outputs.logits, batch["labels"], reduction="sum")

    def evaluate(self, outputs: Outputs, batch: Batch) -> Sums:
        return {"loss": self.loss(outputs, batch).double(), "targets": (batch["labels"] >= 0).sum().double()}

    def num_targets(self, batch: Batch) -> int:
        return int((batch["labels"] >= 0).sum())

    def num_tokens(self, batch: Batch) -> int:
        return len(batch["labels"])

    def metrics(self, sums: Mapping[str, torch.Tensor]) -> dict[str, Metric]:
        return {"loss": Metric(float(sums["loss"]) / max(float(sums["targets"]), 1.0), "lower")}


def network_config(
    builtin: str, arguments: Mapping[str, Any], parallel: Mapping[str, Any], **sections: Any
) -> RunConfig:
    """A run of a built-in network; no samples are read. No clipping and no decay, so that all that differs shows."""
    values = {
        "steps": 4,
        "model": {"builtin": builtin, "arguments": dict(arguments)},
        "task": {"name": "module:Task"},
        "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.0, "weight_decay": 0.0, "clip_norm": 0.0},
        "parallel": dict(parallel),
        "batch": {"global_size": 12, "micro_size": 1},
    }
    return parse_config(values | sections, "test")


def network_engine(config: RunConfig, facts: SampleFacts, ranks: Ranks) -> Engine:
    """The run's engine, with fresh parameters."""
    return build_model_engine(config, RowClassification(), build_mesh(config.parallel, ranks), ranks, facts)[0]


def random_rows(facts: SampleFacts, num_rows: int, seed: int) -> Batch:
    """Rows of whatever the facts say, far from mean 0 and of several lengths, with a class each."""
    generator = torch.Generator().manual_seed(seed)
    batch: Batch = {"labels": torch.randint(NUM_CLASSES, (num_rows,), generator=generator)}
    if facts.image_shape is not None:
        batch["pixel_values"] = 3 + torch.randn(num_rows, *facts.image_shape, generator=generator)
    if facts.num_features:
        batch["features"] = 3 + torch.randn(num_rows, facts.num_features, generator=generator)
    if facts.categories:
        columns = [torch.randint(size, (num_rows,), generator=generator) for _, size in facts.categories]
        batch["categories"] = torch.stack(columns, dim=1)
    if facts.vocab_size is not None and facts.sequence_length is not None:
        shape = (num_rows, facts.sequence_length)
        lengths = torch.randint(1, facts.sequence_length + 1, (num_rows, 1), generator=generator)
        batch["input_ids"] = torch.randint(facts.vocab_size, shape, generator=generator)
        batch["attention_mask"] = (torch.arange(facts.sequence_length) < lengths).long()
    return batch


def split_rows(batch: Batch, sizes: Sequence[int]) -> list[Batch]:
    """A batch cut into batches of so many rows, which may be none."""
    parts = {name: tensor.split(list(sizes)) for name, tensor in batch.items()}
    return [{name: pieces[index] for name, pieces in parts.items()} for index in range(len(sizes))]
