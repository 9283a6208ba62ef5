"""What the trainer asks of a task."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import nn

from sharding.engine import Batch
from trainer.architectures.initialization import initialize_module
from trainer.config.sections import ModelConfig
from trainer.data.facts import SampleFacts
from trainer.tasks.scores import ClassScores


@dataclass(frozen=True, eq=False)
class Outputs:
    """What a forward pass hands to the loss and to evaluation.

    Attributes:
        logits: what the model predicts, fp32, dim 0 the sample; None where only the loss was computed.
        loss_sum: the summed loss, an fp32 scalar with a gradient, where the model's head computes it itself.
    """

    logits: torch.Tensor | None = None
    loss_sum: torch.Tensor | None = None


Better = Literal["lower", "higher"]
"""Which direction of a metric is better."""


@dataclass(frozen=True)
class Metric:
    """A metric's value, and which direction of it is better."""

    value: float
    better: Better


@dataclass(frozen=True)
class ClassTable:
    """How well a classification tells each class from the others.

    Attributes:
        classes: their names.
        scores: of each.
        confusion: number of samples by true class, the row, and by the class that they were taken for; None where
            there are too many classes.
    """

    classes: tuple[str, ...]
    scores: list[ClassScores]
    confusion: list[list[int]] | None


Sums = dict[str, torch.Tensor]
"""Named sums over samples, fp64 tensors of any shape, which add up over batches and ranks; ``Task.kept`` does not."""


class Task(Protocol):
    """A way of training: which model, which batches, which loss, which metrics.

    The loss is a sum over valid targets and never a mean: the trainer divides it by the number of valid targets in the
    whole global batch, which makes accumulation and parallelism exact.

    A task of one's own inherits from this class, or from a task that is there. Its constructor may have arguments
    ``options``, the mapping ``task.options``, ``settings``, the whole section ``task``, and ``facts``, what is known of
    the samples.

    Attributes:
        kept: names of what ``evaluate`` gives that is not added up. Dim 0 of it, as long for every batch of as many
            rows, is put one behind the other instead, for all that a metric needs and no sum holds: such as each
            sample's score where their ranks count. In no order that means anything, and samples that only fill up are
            in it: say by a column of it that they do not count.
    """

    kept: frozenset[str] = frozenset()

    @abstractmethod
    def build_model(self, model_settings: ModelConfig, facts: SampleFacts) -> nn.Module:
        """The model for this task, on torch's current default device.

        Args:
            model_settings: the section ``model``; ``trainer.architectures.config`` makes a configuration of
                `transformers` of it.
            facts: what is known of the samples.
        """

    def initialize(self, model: nn.Module, module: nn.Module) -> None:
        """Give one module's own parameters and buffers their initial values, drawn from torch's default generator.

        By default as its model prescribes: `_init_weights` of `transformers`, else the module's ``reset_parameters``.
        """
        initialize_module(model, module)

    def pretrained_name(self, name: str) -> str:
        """Name in ``model.pretrained`` of the weights of one of the model's tensors; by default its own name."""
        return name

    @abstractmethod
    def make_batch(self, samples: Batch, positions: torch.Tensor, training: bool) -> Batch:
        """Turn samples into a batch, on the host, before the step.

        May draw from the default generators of torch, NumPy and Python. In training they are seeded by step and rank;
        in evaluation by the sample's position, and a task that draws gets the samples of a micro-batch one by one.
        Draws that belong to samples in training as well come from generators that are seeded by ``positions``.

        Args:
            samples: as they were read. Packed tokens are as ``trainer.data.packed.packed_rows`` gives them, and
                ``trainer.tasks.next_tokens.next_token_batch`` shifts them; of conversations ``is_target`` says which
                are to be predicted.
            positions: global position of each sample, int64 [micro]. One at ``trainer.data.samples.FILLER`` only fills
                up a batch of an evaluation, and must have no target.
            training: whether the batch is for training; else for evaluation.
        """

    @abstractmethod
    def inputs(self, batch: Batch) -> Batch:
        """What of a batch the model's forward pass is called with, by argument."""

    @abstractmethod
    def forward(self, model: nn.Module, batch: Batch) -> Outputs:
        """Run the model on a batch that is on the device, in training and in evaluation."""

    @abstractmethod
    def loss(self, outputs: Outputs, batch: Batch) -> torch.Tensor:
        """Sum of the losses of all valid targets, an fp32 scalar with a gradient."""

    @abstractmethod
    def evaluate(self, outputs: Outputs, batch: Batch) -> Sums:
        """Sums that the metrics follow from; of one row at a time where anything is drawn."""

    @abstractmethod
    def num_targets(self, batch: Batch) -> int:
        """Valid targets in a batch that is on the host."""

    @abstractmethod
    def num_tokens(self, batch: Batch) -> int:
        """Tokens, or whatever samples consist of, that the model computes on in a batch that is on the host."""

    @abstractmethod
    def metrics(self, sums: Mapping[str, torch.Tensor]) -> dict[str, Metric]:
        """Named metrics, from the sums of a whole split, fp64 on the host."""

    def directions(self) -> Mapping[str, Better] | None:
        """Which direction of each metric is better, by the metric's name; None where that is not known before training.

        By it a metric is refused that a run is to be judged by, and that there is none of.
        """
        return None

    def class_logits(self, outputs: Outputs, batch: Batch) -> tuple[torch.Tensor, torch.Tensor] | None:
        """What a student learns of its teacher by ``distill``; None where a task cannot say it, as by default.

        Returns:
            Logits of all classes, or tokens, fp32 [..., classes], and where there is a target, bool [...], dim 0 the
            sample.
        """
        return None

    def class_table(self, sums: Mapping[str, torch.Tensor]) -> ClassTable | None:
        """Scores of each class, from the sums of a whole split; None where there are no classes, as by default."""
        return None
