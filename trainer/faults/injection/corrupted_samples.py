"""Bad documents on purpose: a task whose loss is corrupted for certain samples, for drills and tests."""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from sharding.engine import Batch
from trainer.config.data import SampleRange
from trainer.config.sections import ModelConfig
from trainer.data.facts import SampleFacts
from trainer.faults.injection.inject import CORRUPTING_FAULTS, Fault
from trainer.tasks.task import Better, ClassTable, Metric, Outputs, Sums, Task

_FACTORS = {"nan": math.nan, "spike": 1e4}


class CorruptedTask:
    """A task whose loss, and so whose gradient, is multiplied where a step has corrupted samples.

    The fault belongs to the samples, as that of a bad document does: it does not come again where they are skipped.
    """

    def __init__(
        self, task: Task, faults: Sequence[Fault], global_size: int, report: Callable[[str], None] = lambda _: None
    ) -> None:
        """Corrupt what the faults name.

        Args:
            task: does everything else.
            faults: those of this rank; others than ``nan`` and ``spike`` are not looked at.
            global_size: samples in a step.
            report: hears of each step that is corrupted, by the fault's name.
        """
        self._task = task
        self.kept = task.kept
        self._spoiled = [
            ((fault.step - 1) * global_size, (fault.step - 1 + fault.num_steps) * global_size, fault.fault)
            for fault in faults
            if fault.fault in CORRUPTING_FAULTS
        ]
        self._report = report
        self._reported: list[SampleRange] = []
        self._factor = 1.0
        self.next_samples: Callable[[], list[SampleRange]] = list

    @property
    def inner(self) -> Task:
        """The task that is corrupted."""
        return self._task

    def build_model(self, model_settings: ModelConfig, facts: SampleFacts) -> nn.Module:
        """See Task."""
        return self._task.build_model(model_settings, facts)

    def initialize(self, model: nn.Module, module: nn.Module) -> None:
        """See Task."""
        self._task.initialize(model, module)

    def pretrained_name(self, name: str) -> str:
        """See Task."""
        return self._task.pretrained_name(name)

    def make_batch(self, samples: Batch, positions: torch.Tensor, training: bool) -> Batch:
        """See Task; comes before the batch's loss."""
        self._factor = 1.0
        ranges = self.next_samples()
        for start, stop, fault in self._spoiled:
            if any(first < stop and start < end for first, end in ranges):
                self._factor = _FACTORS[fault]
                if ranges != self._reported:
                    self._report(fault)
                    self._reported = ranges
        return self._task.make_batch(samples, positions, training)

    def inputs(self, batch: Batch) -> Batch:
        """See Task."""
        return self._task.inputs(batch)

    def forward(self, model: nn.Module, batch: Batch) -> Outputs:
        """See Task."""
        return self._task.forward(model, batch)

    def loss(self, outputs: Outputs, batch: Batch) -> torch.Tensor:
        """See Task."""
        return self._task.loss(outputs, batch) * self._factor

    def evaluate(self, outputs: Outputs, batch: Batch) -> Sums:
        """See Task."""
        return self._task.evaluate(outputs, batch)

    def num_targets(self, batch: Batch) -> int:
        """See Task."""
        return self._task.num_targets(batch)

    def num_tokens(self, batch: Batch) -> int:
        """See Task."""
        return self._task.num_tokens(batch)

    def metrics(self, sums: Mapping[str, torch.Tensor]) -> dict[str, Metric]:
        """See Task."""
        return self._task.metrics(sums)

    def directions(self) -> Mapping[str, Better] | None:
        """See Task."""
        return self._task.directions()

    def class_logits(self, outputs: Outputs, batch: Batch) -> tuple[torch.Tensor, torch.Tensor] | None:
        """See Task."""
        return self._task.class_logits(outputs, batch)

    def class_table(self, sums: Mapping[str, torch.Tensor]) -> ClassTable | None:
        """See Task."""
        return self._task.class_table(sums)
