"""The slice exchange of flat memory as collectives of ``fully_shard``, for process groups on which it is faster."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather, ReduceScatter

from sharding.flat_collectives import exchanges_slices, start_gather, start_sum


def use_slice_exchange(module: FSDPModule, group: dist.ProcessGroup | None) -> None:
    """Let a module that ``fully_shard`` has divided over a group gather and reduce by slices, where that is faster.

    Args:
        module: the module.
        group: the ranks; None for all.
    """
    if exchanges_slices(group):
        module.set_custom_all_gather(SliceAllGather())
        module.set_custom_reduce_scatter(SliceReduceScatter())


class _PlainMemory:
    """Memory of collectives as torch has it, in no pool of a backend's."""

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Memory for what is gathered, or for addends and sum."""
        return torch.empty(*size, dtype=dtype, device=device)


class SliceAllGather(_PlainMemory, AllGather):
    """Gathers by a broadcast of each rank's slice, in place.

    It waits for nothing: whoever uses the result does, so what is gathered ahead travels during computation, though a
    CPU has no streams.
    """

    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        async_op: bool = False,
    ) -> dist.Work:
        """Fill the output with the slices of all ranks; the input is this rank's, and lies in it."""
        return _AllOf(start_gather(output_tensor, input_tensor, group))


class SliceReduceScatter(_PlainMemory, ReduceScatter):
    """Sums each rank's slice on that rank, of what all others send it.

    It waits, for ``fully_shard`` reads the sum at once.
    """

    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> None:
        """Write the sum of this rank's slices of all inputs to the output.

        Raises:
            ValueError: what is asked for is no sum.
        """
        if op != dist.ReduceOp.SUM:
            raise ValueError(f"slices are summed, but {op} was asked for")
        received = torch.empty_like(input_tensor)
        start_sum(input_tensor, output_tensor, received, group).finish(output_tensor, adds=False)


class _AllOf(dist.Work):
    """Several works as one."""

    def __init__(self, works: Sequence[dist.Work]) -> None:
        super().__init__()
        self._works = works

    def wait(self, timeout: Any = None) -> bool:
        # The group's own timeout is of each.
        return all(work.wait() for work in self._works)
