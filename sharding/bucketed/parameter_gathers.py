"""Gathering of flat buckets after a step, behind the work up to each block of the next forward pass."""

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import nn

from sharding.blocks import find_blocks, modules_outside
from sharding.bucketed.flat_buckets import FlatBucket
from sharding.flat_collectives import start_gather


class ParameterGathers:
    """Gathers all buckets in the order in which the forward pass needs them, and lets it wait for each."""

    def __init__(self, model: nn.Module, buckets: Sequence[FlatBucket], group: dist.ProcessGroup | None) -> None:
        """Attach to the modules of a model.

        Each block waits for its buckets. What comes after the blocks may be used without a call of its module, as a
        fused head is: the last block waits for all. What comes before is waited for by every module outside of them,
        and each of these for its own besides: the order in which modules are registered need not be that of the pass.

        Args:
            model: the model; its blocks may be compiled.
            buckets: its parameters, last first.
            group: the ranks that divide each bucket.
        """
        self._buckets = buckets
        self._group = group
        self._works: dict[int, list[dist.Work]] = {}
        bucket_of = {id(member.parameter): index for index, b in enumerate(buckets) for member in b.members}
        blocks = [block for _, block in find_blocks(model)]
        blocks_found = set(blocks)
        inside = [{bucket_of[id(p)] for p in block.parameters() if id(p) in bucket_of} for block in blocks]
        every = set(range(len(buckets)))
        before = {index for index in every if not inside or index >= max(inside[0], default=0)}
        for block, indices in zip(blocks, [*inside[:-1], every], strict=False):
            self._attach(block, indices)
        for module in modules_outside(model, blocks):
            # What contains a block would wait for all of it.
            own = module.parameters(recurse=not any(child in blocks_found for child in module.modules()))
            self._attach(module, before | {bucket_of[id(p)] for p in own if id(p) in bucket_of})

    def start(self) -> None:
        """Begin to gather every bucket; this rank's slices must be ready, and stay as they are until the end."""
        for index in reversed(range(len(self._buckets))):
            bucket = self._buckets[index]
            self._works[index] = start_gather(bucket.flat, bucket.own(bucket.flat), self._group)

    def wait(self, indices: Iterable[int] | None = None) -> None:
        """Wait for buckets, all if none are named."""
        if not self._works:
            return
        for index in list(self._works) if indices is None else indices:
            for work in self._works.pop(index, ()):
                work.wait()

    def begin_pass(self, *, has_gradients: bool) -> None:
        """Nothing: what a pass needs is on its way."""

    def end_forward(self) -> None:
        """Nothing."""

    def come_to(self, bucket: FlatBucket) -> None:
        """Nothing: no other rank waits for a gathering."""

    def end_pass(self) -> None:
        """Nothing: parameters stay."""

    def leave(self, bucket: FlatBucket) -> None:
        """Nothing: parameters stay."""

    def _attach(self, module: nn.Module, indices: set[int]) -> None:
        # A block may be compiled together with its hooks; this one must stay outside the graph.
        @torch.compiler.disable
        def wait(_module: nn.Module, _arguments: object) -> None:
            self.wait(indices)

        module.register_forward_pre_hook(wait)
