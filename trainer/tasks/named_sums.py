"""A task's named sums as the one vector that engines and ranks add up, and back."""

from collections.abc import Sequence

import torch
from torch import nn

from sharding.engine import Batch
from trainer.tasks.task import Sums, Task


class NamedSums:
    """The evaluation function of a task for an engine: a vector of all sums, in sorted order of their names."""

    def __init__(self, task: Task) -> None:
        """Bind to a task, whose sums have the same names and shapes for every batch."""
        self._task = task
        self._shapes: dict[str, torch.Size] = {}

    def __call__(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Run the model and sum; fp64 [elements of all sums]."""
        sums = self._task.evaluate(self._task.forward(model, batch), batch)
        self._shapes = {name: sums[name].shape for name in sorted(sums)}
        return torch.cat([sums[name].double().flatten() for name in self._shapes])

    def by_name(self, vector: Sequence[float]) -> Sums:
        """The sums that a vector of the last batch's form holds, fp64 on the host."""
        whole = torch.tensor(vector, dtype=torch.float64)
        parts = whole.split([shape.numel() for shape in self._shapes.values()])
        return {name: part.view(shape) for (name, shape), part in zip(self._shapes.items(), parts, strict=True)}
