"""A task's named sums as the one vector that engines and ranks add up, and back."""

from collections.abc import Iterable

import torch
from torch import nn

from sharding.engine import Batch
from trainer.tasks.task import Sums, Task


class NamedSums:
    """The evaluation function of a task for an engine: a vector of all sums, in sorted order of their names.

    What the task keeps by sample (``Task.kept``) stands behind what is added up, and is put one behind the other.
    """

    def __init__(self, task: Task) -> None:
        """Bind to a task, whose sums have the same names and shapes for every batch of as many rows."""
        self._task = task
        self._added: dict[str, torch.Size] = {}
        self._kept: dict[str, torch.Size] = {}

    def __call__(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Run the model and sum; fp64 [elements of all sums]."""
        sums = self._task.evaluate(self._task.forward(model, batch), batch)
        names, kept = sorted(sums), self._task.kept
        self._added = {name: sums[name].shape for name in names if name not in kept}
        self._kept = {name: sums[name].shape for name in names if name in kept}
        return torch.cat([sums[name].double().flatten() for name in (*self._added, *self._kept)])

    @property
    def num_added(self) -> int:
        """Elements of a vector that are added up; those behind them are kept."""
        return sum(shape.numel() for shape in self._added.values())

    def total(self, vectors: Iterable[torch.Tensor]) -> torch.Tensor:
        """Vectors of batches, or totals of them, as one: what is added up in their order, then what is kept."""
        added: torch.Tensor | None = None
        kept = []
        for vector in vectors:
            part = vector[: self.num_added]
            added = part if added is None else added + part
            kept.append(vector[self.num_added :])
        assert added is not None, "there is a vector"
        return torch.cat([added, *kept]) if any(map(len, kept)) else added

    def by_name(self, of_ranks: torch.Tensor) -> Sums:
        """The sums that vectors of the last batch's form hold, fp64 on the host.

        Args:
            of_ranks: each rank's total, all of the same length, [ranks, elements].
        """
        whole = of_ranks.double().cpu()
        # Over ranks in their order, so that sums come out the same everywhere.
        added = whole[:, : self.num_added].sum(dim=0)
        batches = whole[:, self.num_added :].reshape(-1, sum(shape.numel() for shape in self._kept.values()) or 1)
        sums = {name: part.view(self._added[name]) for name, part in _parts(added, self._added).items()}
        kept = {name: part.reshape(-1, *self._kept[name][1:]) for name, part in _parts(batches, self._kept).items()}
        return sums | kept


def _parts(whole: torch.Tensor, shapes: dict[str, torch.Size]) -> dict[str, torch.Tensor]:
    """Slices of the last dimension by name."""
    sizes = [shape.numel() for shape in shapes.values()]
    return dict(zip(shapes, whole.split(sizes, dim=-1), strict=True)) if sizes else {}
