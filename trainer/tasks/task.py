"""What the trainer asks of a task."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from sharding.engine import Batch

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class Task(Protocol):
    """A way of training: which model, which batches, which loss, which metrics.

    The loss is a sum over valid targets and never a mean: the trainer divides it by the number of valid targets in the
    whole global batch, which makes accumulation and parallelism exact.
    """

    def build_model(self, model_config: "PretrainedConfig") -> nn.Module:
        """The model for this task, from a configuration, on torch's current default device."""

    def make_batch(self, sequences: Batch) -> Batch:
        """Turn packed sequences into a batch.

        They are ``input_ids`` and shifted ``labels``, int64 [micro, length], and under ``data.document_mask`` also
        ``position_ids``, which start again with each document and must reach the model.

        Runs on the host, before the step; may draw from the default generators of torch, NumPy and Python. In training
        they are seeded by step and rank; in evaluation by the sample's position, and a task that draws gets the rows of
        a micro-batch one by one.
        """

    def num_targets(self, batch: Batch) -> int:
        """Valid targets in a batch that is on the host."""

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Sum of the losses of all valid targets, an fp32 scalar with a gradient."""

    def evaluation_sums(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """A vector of fp64 sums that add up over batches and ranks; of one row at a time where anything is drawn."""

    def evaluation_metrics(self, sums: Sequence[float]) -> dict[str, Any]:
        """Named metrics, ``eval/...``, from the added-up sums."""
