"""ZeRO stage 3 in flat buckets: a block's parameters are gathered when they are used, and freed after.

As in Zhao et al., "PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel" (2023), section 3: the next block
is gathered while one computes, forwards and backwards. Here the block that one backward pass ends with is not freed,
since the next forward pass begins with it, and what is in no block stays all the time.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from sharding.blocks import modules_outside
from sharding.bucketed.flat_buckets import FlatBucket, flatten_parameters
from sharding.flat_collectives import start_gather
from sharding.mesh import ParallelMesh


@dataclass(frozen=True)
class BucketedBlock:
    """A block and the buckets that hold its parameters, those that are trained and those that are frozen."""

    block: nn.Module
    trained: list[FlatBucket]
    frozen: list[FlatBucket]


class BlockBuckets:
    """Flat buckets of a model that is built block by block, so that no rank ever holds all of it."""

    def __init__(self, model: nn.Module, mesh: ParallelMesh, dtype: torch.dtype, max_elements: int) -> None:
        """Look at a model whose parameters need no memory yet.

        Args:
            model: the model; parameters that several modules share are none of a block's.
            mesh: the ranks that divide each bucket.
            dtype: format in which parameters are gathered.
            max_elements: see ``flatten_parameters``.
        """
        self._model = model
        self._mesh = mesh
        self._dtype = dtype
        self._max_elements = max_elements
        every = list(model.named_parameters(remove_duplicate=False))
        num_uses = Counter(id(parameter) for _, parameter in every)
        self._shared = {name for name, parameter in every if num_uses[id(parameter)] > 1}
        self.blocks: list[BucketedBlock] = []

    def add(self, name: str, block: nn.Module) -> None:
        """Flatten the next block of the model, whose parameters have their initial values."""
        parameters = [(f"{name}.{inner}", parameter) for inner, parameter in block.named_parameters()]
        own = [(name, p) for name, p in parameters if name not in self._shared]
        frozen: dict[torch.dtype, list[tuple[str, nn.Parameter]]] = {}
        for name, parameter in own:
            if not parameter.requires_grad:
                frozen.setdefault(parameter.dtype, []).append((name, parameter))
        self.blocks.append(
            BucketedBlock(
                block,
                self._flatten([(name, p) for name, p in own if p.requires_grad]),
                [bucket for members in frozen.values() for bucket in self._flatten(members)],
            )
        )

    def finish(self) -> tuple[list[FlatBucket], list[FlatBucket]]:
        """Flatten all that is in no block; what is frozen of it stays whole on every rank.

        Returns:
            The buckets of what comes after the first block, and of what comes before it.
        """
        buckets = [bucket for one in self.blocks for bucket in (*one.trained, *one.frozen)]
        done = {id(member.parameter) for bucket in buckets for member in bucket.members}
        before: list[tuple[str, nn.Parameter]] = []
        after: list[tuple[str, nn.Parameter]] = []
        place = before
        for name, parameter in self._model.named_parameters():
            if id(parameter) in done:
                place = after
            elif parameter.requires_grad:
                place.append((name, parameter))
        return self._flatten(after), self._flatten(before)

    def _flatten(self, parameters: list[tuple[str, nn.Parameter]]) -> list[FlatBucket]:
        return flatten_parameters(parameters, self._mesh.sharding, self._max_elements, freed_as=self._dtype)


class BlockGathers:
    """Gathers each block for its passes, one ahead, in the same order on every rank.

    A collective is known to the other ranks by its place in the order alone. So a block that this rank does not use,
    or uses only in some passes, is gathered in its turn all the same, and freed at once.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[BucketedBlock],
        outside: Sequence[FlatBucket],
        group: dist.ProcessGroup | None,
    ) -> None:
        """Attach to the modules of a model.

        Args:
            model: the model; its blocks may be compiled.
            blocks: in forward order, with their buckets.
            outside: buckets of what is in no block.
            group: the ranks that divide each bucket; during a pass nothing else may travel in it.
        """
        self._outside = _Gathered(outside, group)
        self._blocks = [_Gathered(block.trained, group, block.frozen) for block in blocks]
        # By id: those that are freed after each pass.
        self._freed = {id(bucket) for block in blocks[1:] for bucket in block.trained}
        self._block_of = {id(bucket): index for index, block in enumerate(blocks) for bucket in block.trained}
        # Blocks that had their turn in this forward pass, and those whose turn in this backward pass is to come.
        self._num_forwards = 0
        self._num_to_go = 0
        self._has_gradients = True
        for index, block in enumerate(one.block for one in blocks):
            block.register_forward_pre_hook(_outside_graphs(lambda *_, index=index: self._before(index)))
            block.register_forward_hook(
                _outside_graphs(lambda _block, _inputs, output, index=index: self._after(index, output))
            )
        for module in modules_outside(model, [one.block for one in blocks]):
            module.register_forward_pre_hook(_outside_graphs(lambda *_: self._outside.wait()))

    def start(self) -> None:
        """Begin to gather what the next pass begins with; this rank's slices must be ready."""
        for block in self._blocks[1:]:
            block.free()
        for gathered in (self._outside, *self._blocks[:1]):
            gathered.free()
            gathered.start()

    def wait(self) -> None:
        """Wait for what is under way."""
        for gathered in (self._outside, *self._blocks):
            gathered.wait_if_started()

    def begin_pass(self, *, has_gradients: bool) -> None:
        """Prepare for a forward pass; ``has_gradients`` says that a backward pass follows."""
        self._num_forwards, self._num_to_go = 0, len(self._blocks)
        self._has_gradients = has_gradients

    def end_forward(self) -> None:
        """Take the turns of the blocks that the forward pass did not come to."""
        if self._num_forwards == len(self._blocks):
            return
        self._pass_over(len(self._blocks))
        if not self._has_gradients and self._blocks:
            self._blocks[0].start()

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
        for block in self._blocks[1:]:
            block.free()

    def leave(self, bucket: FlatBucket) -> None:
        """Free a bucket that backward is done with."""
        if id(bucket) in self._freed:
            bucket.free()

    def _before(self, index: int) -> None:
        if index == 0 and self._num_forwards:
            # A second forward pass of the model, before or without a backward pass.
            self.end_forward()
            self._num_forwards = 0
        self._pass_over(index)
        self._blocks[index].wait()
        self._num_forwards = max(self._num_forwards, index + 1)
        if index + 1 < len(self._blocks):
            self._blocks[index + 1].start()
            return
        # What comes after the blocks may be used without a call of its module, as a fused head is.
        self._outside.wait()
        if not self._has_gradients:
            self._blocks[0].start()

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
            if self._num_to_go:
                self._blocks[self._num_to_go].free()


class _Gathered:
    """Buckets that are gathered and freed together."""

    def __init__(
        self, buckets: Sequence[FlatBucket], group: dist.ProcessGroup | None, frozen: Sequence[FlatBucket] = ()
    ) -> None:
        self._buckets = [*buckets, *frozen]
        self._frozen = frozen
        self._group = group
        self._works: list[dist.Work] = []

    def start(self) -> None:
        """Begin to gather, unless it is there."""
        for bucket in self._buckets:
            if not bucket.is_whole:
                bucket.allocate()
                own = bucket.own(bucket.flat)
                own.copy_(bucket.masters)
                self._works += start_gather(bucket.flat, own, self._group)

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
