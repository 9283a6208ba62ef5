"""Tuned ``fully_shard`` that keeps what the bucketed engine keeps: the comparison of stage 3 at equal memory."""

from contextlib import AbstractContextManager

from torch import nn
from torch.distributed.fsdp import FSDPModule

from benchmarks.contestants.plain_sharded_loop import TunedShardedLoop
from sharding.blocks import find_blocks


class EqualMemoryLoop(TunedShardedLoop):
    """The tuned loop whose first block also stays gathered, from the first forward to the last backward pass of a step.

    What is in no block stays between micro-batches under both, and the last block from forward to backward.
    """

    def _distribute(self, model: nn.Module) -> nn.Module:
        model = super()._distribute(model)
        (_, first), *_ = find_blocks(model)
        assert isinstance(first, FSDPModule)
        self._first = first
        first.set_reshard_after_forward(reshard_after_forward=False)
        self.settings |= {"first block": "resharded after the last micro-batch's backward pass"}
        return model

    def _communication(self, *, is_last: bool) -> AbstractContextManager[None]:
        found = super()._communication(is_last=is_last)
        self._first.set_reshard_after_backward(is_last)
        return found
