"""Sums over ranks and gathering of flat memory that is divided into one equal slice per rank."""

from dataclasses import dataclass

import torch
import torch.distributed as dist

reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
"""torch's own, by its newer name where it has one."""

all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""torch's own, by its newer name where it has one."""


def exchanges_slices(group: dist.ProcessGroup | None) -> bool:
    """Whether slices go from rank to rank as they are, and sums are taken by each rank itself.

    On gloo: its reduce_scatter takes longer than its all_reduce, which moves twice what an exchange does, and its
    all_gather goes by way of fresh memory, there and back.
    """
    return dist.get_backend(group) == "gloo"


@dataclass(frozen=True)
class SliceSum:
    """A sum over ranks that is under way.

    Attributes:
        work: what to wait for.
        addends: what the ranks contribute to this rank's slice, [ranks, length]; or already the sum, [1, length].
    """

    work: dist.Work
    addends: torch.Tensor

    def finish(self, target: torch.Tensor, *, adds: bool) -> None:
        """Wait, and write the sum to memory of a slice's size, or add it to what is there."""
        self.work.wait()
        if adds:
            # Without memory for the sum; the addends' order is the same on every rank.
            for addend in self.addends:
                target.add_(addend)
        elif self.addends.data_ptr() != target.data_ptr():
            torch.sum(self.addends, dim=0, out=target)


def start_sum(
    flat: torch.Tensor, own: torch.Tensor, received: torch.Tensor | None, group: dist.ProcessGroup | None
) -> SliceSum:
    """Begin to sum this rank's slice over ranks.

    Args:
        flat: this rank's addends to all slices; on return from ``finish`` it holds anything.
        own: this rank's slice of ``flat``, a view.
        received: memory of the same size as ``flat`` where ``exchanges_slices`` says so.
        group: the ranks.
    """
    if received is None:
        return SliceSum(reduce_scatter(own, flat, group=group, async_op=True), own[None])
    work = dist.all_to_all_single(received, flat, group=group, async_op=True)
    return SliceSum(work, received.view(-1, len(own)))


def start_gather(flat: torch.Tensor, own: torch.Tensor, group: dist.ProcessGroup | None) -> list[dist.Work]:
    """Begin to fill ``flat`` with the slices of all ranks; ``own``, a view of it, is this rank's."""
    if not exchanges_slices(group):
        return [all_gather(flat, own, group=group, async_op=True)]
    slices = flat.split(len(own))
    return [dist.broadcast(part, group=group, group_src=rank, async_op=True) for rank, part in enumerate(slices)]
