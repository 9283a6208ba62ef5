"""Gathering of flat buckets: of those that stay after a step, of the others when they are used.

What stays is gathered behind the work up to each block of the next forward pass. The buckets of a block that does not
stay are gathered while the block before it computes, forwards and backwards, and freed after, as in Zhao et al.,
"PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel" (2023), section 3.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from sharding.blocks import modules_outside
from sharding.bucketed.flat_buckets import FlatBucket
from sharding.bucketed.model_buckets import ModelBuckets
from sharding.flat_collectives import start_gather


class ParameterGathers:
    """Gathers buckets in the same order on every rank, and lets the forward and backward pass wait for them.

    A collective is known to the other ranks by its place in the order alone. So a block that this rank does not use,
    or uses only in some passes, is gathered in its turn all the same, and freed at once.
    """

    def __init__(self, model: nn.Module, buckets: ModelBuckets, group: dist.ProcessGroup | None) -> None:
        """Attach to the modules of a model.

        Of what stays, each block waits for its own. What comes after the blocks may be used without a call of its
        module, as a fused head is: the last block waits for all. What comes before is waited for by every module
        outside of them, and each of these for its own besides: the order in which modules are registered need not be
        that of the pass.

        Args:
            model: the model; its blocks may be compiled.
            buckets: its parameters; those that stay are whole.
            group: the ranks that divide each bucket; during a pass nothing else may travel in it, where any are freed.
        """
        self._group = group
        freed = {id(bucket) for trained, frozen in buckets.freed for bucket in (*trained, *frozen)}
        # In the order of the forward pass.
        self._staying = [bucket for bucket in reversed(buckets.trained) if id(bucket) not in freed]
        self._frozen = [bucket for bucket in buckets.frozen if id(bucket) not in freed]
        self._works: dict[int, list[dist.Work]] = {}
        # None where nothing is freed; with an entry for those that stay where anything is.
        self._blocks = [_FreedBlock(*both, group) for both in buckets.freed] if freed else []
        # By id: those that are freed when backward has filled them, and whose.
        self._block_of = {id(bucket): index for index, (own, _) in enumerate(buckets.freed) for bucket in own}
        # Blocks that had their turn in this forward pass, and those whose turn in this backward pass is to come.
        self._num_forwards = 0
        self._num_to_go = 0
        self._has_gradients = True
        self._attach(model, buckets.blocks)

    def start(self, *, with_frozen: bool = False) -> None:
        """Begin to gather what stays; this rank's masters must be ready, and stay as they are until the end."""
        for block in self._blocks:
            block.free()
        for index, bucket in enumerate(self._staying):
            self._works[index] = start_gather(bucket.flat, bucket.take_masters(), self._group)
        for bucket in self._frozen if with_frozen else ():
            for work in start_gather(bucket.flat, bucket.take_masters(), self._group):
                work.wait()

    def wait(self, indices: Iterable[int] | None = None) -> None:
        """Wait for what is under way; of what stays for these buckets, if any are named."""
        if indices is None:
            indices = list(self._works)
            for block in self._blocks:
                block.wait_if_started()
        if self._works:
            for index in indices:
                for work in self._works.pop(index, ()):
                    work.wait()

    def begin_pass(self, *, has_gradients: bool) -> None:
        """Prepare for a forward pass; ``has_gradients`` says that a backward pass follows."""
        self._num_forwards, self._num_to_go = 0, len(self._blocks)
        self._has_gradients = has_gradients

    def end_forward(self) -> None:
        """Take the turns of the blocks that the forward pass did not come to."""
        self._pass_over(len(self._blocks))

    def come_to(self, bucket: FlatBucket) -> None:
        """Take the turns of a bucket's block, and of those after it, that backward did not come to.

        Before the bucket's gradient leaves: the others may come to it only when they have the block.
        """
        index = self._block_of.get(id(bucket))
        if index is not None:
            self._pass_over_backward(index)

    def end_pass(self) -> None:
        """Take the turns that are left, and free what this rank did not come to; after each backward or last pass."""
        self.end_forward()
        if self._has_gradients:
            self._pass_over_backward(0)
        for block in self._blocks:
            block.free()

    def leave(self, bucket: FlatBucket) -> None:
        """Free a bucket that backward is done with."""
        if id(bucket) in self._block_of:
            bucket.free()

    def _attach(self, model: nn.Module, blocks: Sequence[nn.Module]) -> None:
        bucket_of = {id(member.parameter): index for index, b in enumerate(self._staying) for member in b.members}
        inside = [{bucket_of[id(p)] for p in block.parameters() if id(p) in bucket_of} for block in blocks]
        every = set(range(len(self._staying)))
        before = {index for index in every if not inside or index <= min(inside[0], default=len(every))}
        for block, indices in zip(blocks, [*inside[:-1], every], strict=False):
            self._before_forward(block, partial(self.wait, indices))
        for index, block in enumerate(blocks if self._blocks else ()):
            self._before_forward(block, partial(self._come_forward, index))
            block.register_forward_hook(
                _outside_graphs(lambda _block, _inputs, output, index=index: self._after(index, output))
            )
        blocks_found = set(blocks)
        for module in modules_outside(model, blocks):
            # What contains a block would wait for all of it.
            own = module.parameters(recurse=not any(child in blocks_found for child in module.modules()))
            own_buckets = {bucket_of[id(p)] for p in own if id(p) in bucket_of}
            self._before_forward(module, partial(self.wait, before | own_buckets))

    def _before_forward(self, module: nn.Module, action: Callable[[], None]) -> None:
        module.register_forward_pre_hook(_outside_graphs(lambda *_: action()))

    def _come_forward(self, index: int) -> None:
        if index == 0 and self._num_forwards:
            # A second forward pass of the model, before or without a backward pass.
            self.end_forward()
            self._num_forwards = 0
        self._pass_over(index)
        self._blocks[index].wait()
        self._num_forwards = max(self._num_forwards, index + 1)
        if index + 1 < len(self._blocks):
            self._blocks[index + 1].start()

    def _after(self, index: int, output: Any) -> None:
        for tensor in _tensors(output):
            if tensor.requires_grad:
                tensor.register_hook(lambda _gradient: self._before_backward(index))
        if not self._is_kept(index):
            self._blocks[index].free()

    def _before_backward(self, index: int) -> None:
        self.end_forward()
        self._pass_over_backward(index + 1)
        self._blocks[index].wait()
        self._num_to_go = min(self._num_to_go, index)
        if index + 1 < len(self._blocks):
            # No gradient says when backward is done with what is frozen, but that of the block's input does.
            self._blocks[index + 1].free_frozen()
        if index:
            self._blocks[index - 1].start()

    def _is_kept(self, index: int) -> bool:
        """Whether a block stays after its forward pass, since the backward pass begins with it."""
        return self._has_gradients and index + 1 == len(self._blocks)

    def _pass_over(self, stop: int) -> None:
        """Take the forward turns of the blocks before ``stop`` that were not called."""
        while self._num_forwards < stop:
            index = self._num_forwards
            self._blocks[index].start()
            if not self._is_kept(index):
                self._blocks[index].free()
            self._num_forwards += 1

    def _pass_over_backward(self, stop: int) -> None:
        """Take the backward turns of the blocks from ``stop`` on that backward did not come to."""
        while self._num_to_go > stop:
            self._num_to_go -= 1
            self._blocks[self._num_to_go].start()
            self._blocks[self._num_to_go].free()


class _FreedBlock:
    """Buckets of a block that are gathered and freed together; none for a block that stays."""

    def __init__(
        self, trained: Sequence[FlatBucket], frozen: Sequence[FlatBucket], group: dist.ProcessGroup | None
    ) -> None:
        self._buckets = [*trained, *frozen]
        self._frozen = frozen
        self._group = group
        self._works: list[dist.Work] = []

    def start(self) -> None:
        """Begin to gather, unless it is there."""
        for bucket in self._buckets:
            if not bucket.is_whole:
                bucket.allocate()
                self._works += start_gather(bucket.flat, bucket.take_masters(), self._group)

    def wait(self) -> None:
        """Wait until it is there."""
        self.start()
        self.wait_if_started()

    def wait_if_started(self) -> None:
        while self._works:
            self._works.pop().wait()

    def free(self) -> None:
        self._free(self._buckets)

    def free_frozen(self) -> None:
        if self._frozen:
            self._free(self._frozen)

    def _free(self, buckets: Sequence[FlatBucket]) -> None:
        # Memory that others still write to is not given back.
        self.wait_if_started()
        for bucket in buckets:
            if bucket.is_whole:
                bucket.free()


def _outside_graphs(hook: Callable[..., None]) -> Callable[..., None]:
    """A hook that is no part of the graph where its block is compiled."""
    return torch.compiler.disable(hook)


def _tensors(output: Any) -> Iterator[torch.Tensor]:
    """The tensors that a block gives back."""
    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, dict):
        yield from _tensors(tuple(output.values()))
    elif isinstance(output, (tuple, list)):
        for element in output:
            yield from _tensors(element)
