"""What the trainer asks of a task."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import nn

from sharding.engine import Batch

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True, eq=False)
class Outputs:
    """What a forward pass hands to the loss and to evaluation.

    Attributes:
        logits: what the model predicts, fp32, dim 0 the sample; None where only the loss was computed.
        loss_sum: the summed loss, an fp32 scalar with a gradient, where the model's head computes it itself.
    """

    logits: torch.Tensor | None = None
    loss_sum: torch.Tensor | None = None


@dataclass(frozen=True)
class Metric:
    """A metric's value, and which direction of it is better."""

    value: float
    better: Literal["lower", "higher"]


Sums = dict[str, torch.Tensor]
"""Named sums over samples, fp64 tensors of any shape, which add up over batches and ranks."""


class Task(Protocol):
    """A way of training: which model, which batches, which loss, which metrics.

    The loss is a sum over valid targets and never a mean: the trainer divides it by the number of valid targets in the
    whole global batch, which makes accumulation and parallelism exact.
    """

    def build_model(self, model_config: "PretrainedConfig") -> nn.Module:
        """The model for this task, from a configuration, on torch's current default device."""

    def make_batch(self, samples: Batch, positions: torch.Tensor, training: bool) -> Batch:
        """Turn samples into a batch, on the host, before the step.

        May draw from the default generators of torch, NumPy and Python. In training they are seeded by step and rank;
        in evaluation by the sample's position, and a task that draws gets the samples of a micro-batch one by one.
        Draws that belong to samples in training as well come from generators that are seeded by ``positions``.

        Args:
            samples: as they were read. Packed tokens are as ``trainer.data.packed.packed_rows`` gives them, and
                ``trainer.tasks.next_tokens.next_token_batch`` shifts them.
            positions: global position of each sample, int64 [micro]. One at ``trainer.data.samples.FILLER`` only fills
                up a batch of an evaluation, and must have no target.
            training: whether the batch is for training; else for evaluation.
        """

    def inputs(self, batch: Batch) -> Batch:
        """What of a batch the model's forward pass is called with, by argument."""

    def forward(self, model: nn.Module, batch: Batch) -> Outputs:
        """Run the model on a batch that is on the device, in training and in evaluation."""

    def loss(self, outputs: Outputs, batch: Batch) -> torch.Tensor:
        """Sum of the losses of all valid targets, an fp32 scalar with a gradient."""

    def evaluate(self, outputs: Outputs, batch: Batch) -> Sums:
        """Sums that the metrics follow from; of one row at a time where anything is drawn."""

    def num_targets(self, batch: Batch) -> int:
        """Valid targets in a batch that is on the host."""

    def num_tokens(self, batch: Batch) -> int:
        """Tokens, or whatever samples consist of, that the model computes on in a batch that is on the host."""

    def metrics(self, sums: Mapping[str, torch.Tensor]) -> dict[str, Metric]:
        """Named metrics, from the sums of a whole split, fp64 on the host."""
