"""Gradients in flat buckets, which leave for the other ranks as soon as backward has filled them."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from sharding.bucketed.flat_buckets import BucketMember, FlatBucket
from sharding.flat_collectives import SliceSum, exchanges_slices, start_sum
from sharding.memory_formula import MAX_BUCKETS_IN_FLIGHT
from sharding.mesh import ParallelMesh


class GradientBuckets:
    """Accumulates gradients and sums them over ranks; each rank ends up with those of its own slices.

    Buckets travel in the same order on every rank, whatever order backward fills them in: a collective is known to the
    other ranks by its place in the order alone. The order is that in which rank 0's first backward pass has filled
    them, so that none waits for one that is filled later. It says nothing of how addends are added up.

    Attributes:
        own: of each bucket this rank's slice of the gradient, always the same memory.
    """

    def __init__(
        self,
        groups: Sequence[Sequence[FlatBucket]],
        group: dist.ProcessGroup | None,
        mesh: ParallelMesh,
        max_elements: int,
        *,
        keeps_whole: bool,
        filled: Callable[[FlatBucket], None] = lambda _: None,
        before_sending: Callable[[FlatBucket], None] = lambda _: None,
    ) -> None:
        """Attach to the parameters of the buckets.

        Args:
            groups: buckets as backward fills them; one of a later group never travels before one of an earlier.
            group: the ranks that divide each bucket.
            mesh: all ranks whose gradients add up, of which others may divide buckets among them in the same way.
            max_elements: size of all buckets but those of one parameter.
            keeps_whole: whether whole gradients are accumulated and summed in the last micro-batch (stage 1), or those
                of each micro-batch are summed and the own slice is kept (stage 2).
            filled: called when backward is past all uses of a bucket's parameters.
            before_sending: called before a bucket leaves, which may then wait for other ranks.
        """
        self._buckets = buckets = [bucket for its_buckets in groups for bucket in its_buckets]
        self._group = group
        self._mesh = mesh
        self._keeps_whole = keeps_whole
        self._filled = filled
        self._before_sending = before_sending
        self._exchanges = exchanges_slices(group)
        self._buffers: list[torch.Tensor | None] = [None] * len(buckets)
        if keeps_whole:
            whole = [bucket.masters.new_zeros(bucket.flat.numel()) for bucket in buckets]
            self._buffers = list(whole)
            self.own = [bucket.own(buffer) for bucket, buffer in zip(buckets, whole, strict=True)]
        else:
            self.own = [torch.zeros_like(bucket.masters) for bucket in buckets]
        self._spare = _SpareBuffers(max_elements)
        self._in_flight: deque[_InFlight] = deque()
        # Names of each bucket: whose gradients are to come in this micro-batch, and whose lie in the buffer.
        self._missing: list[set[str]] = []
        self._present: list[set[str]] = [set() for _ in buckets]
        self._order = list(range(len(buckets)))
        self._place_of_group = [place for place, its_buckets in enumerate(groups) for _ in its_buckets]
        # In the order in which the first backward pass fills them; None once that has been learnt.
        self._arrivals: list[int] | None = []
        self._nodes: list[list[tuple[str, torch.autograd.graph.Node]]] = []
        self._num_sent = 0
        self._is_first = self._sends = False
        for index, bucket in enumerate(buckets):
            for member in bucket.members:
                self._attach(index, member)

    def begin_micro_batch(self, *, is_first: bool, is_last: bool) -> None:
        """Prepare for a backward pass: the first since the last step, the last before the next."""
        self._is_first = is_first
        self._sends = is_last or not self._keeps_whole
        self._num_sent = 0
        self._missing = [{member.name for member in bucket.members} for bucket in self._buckets]
        if not self._keeps_whole:
            self._forget_present()

    def expect_reached(self) -> None:
        """Take the gradients of all that this backward pass will not come to for zero; from within it, at its start."""
        for index, nodes in enumerate(self._accumulators()):
            self._missing[index] -= {name for name, node in nodes if not torch._C._will_engine_execute_node(node)}
        self._send_complete()

    def end_micro_batch(self, *, is_last: bool) -> None:
        """Send what backward left incomplete, parameters that it did not reach; after the last wait for all sums."""
        if self._sends:
            while self._num_sent < len(self._buckets):
                self._send_next()
        if is_last:
            while self._in_flight:
                self._finish_oldest()
            if (replicas := self._mesh.replica_group) is not None:
                for work in [dist.all_reduce(own, group=replicas, async_op=True) for own in self.own]:
                    work.wait()
        if self._arrivals is not None:
            self._order = self._learnt_order(self._arrivals)
            self._arrivals = None

    def forget(self) -> None:
        """Drop what was accumulated."""
        if self._keeps_whole:
            self._forget_present()
            for bucket in self._buckets:
                for member in bucket.members:
                    member.parameter.grad = None

    def _forget_present(self) -> None:
        for present in self._present:
            present.clear()

    def _learnt_order(self, arrivals: list[int]) -> list[int]:
        """Rank 0's; no rank is here whose pass has failed, as none is in the sums."""
        arrived = {index: place for place, index in enumerate(arrivals)}
        order = sorted(self._order, key=lambda index: (self._place_of_group[index], arrived.get(index, len(arrived))))
        told = torch.tensor(order, device=self.own[0].device)
        dist.broadcast(told, group=self._mesh.reduction_group, group_src=0)
        return told.tolist()

    def _accumulators(self) -> list[list[tuple[str, torch.autograd.graph.Node]]]:
        """Of each bucket's members the nodes of graphs that accumulate their gradients, which are the same for good."""
        if not self._nodes:
            with torch.enable_grad():
                self._nodes = [
                    [(member.name, _accumulator(member.parameter)) for member in bucket.members]
                    for bucket in self._buckets
                ]
        return self._nodes

    def _attach(self, index: int, member: BucketMember) -> None:
        buffer = self._buffers[index]
        place = None if buffer is None else self._buckets[index].view(buffer, member)
        member.parameter.register_post_accumulate_grad_hook(lambda _: self._arrived(index, member, place))

    def _arrived(self, index: int, member: BucketMember, place: torch.Tensor | None) -> None:
        """Take in the gradient that backward has just finished for a parameter, summed over all its uses.

        Args:
            index: the parameter's bucket.
            member: the parameter.
            place: where its gradients add up, if that is always the same.
        """
        if place is None:
            buffer = self._buffers[index]
            if buffer is None:
                buffer = self._buffers[index] = self._spare.take(self._buckets[index])
            place = self._buckets[index].view(buffer, member)
        gradient = member.parameter.grad
        if gradient is not None and gradient is not place:
            # In stage 1 backward itself adds the next micro-batch's gradient in place, if both have one format.
            is_added_by_backward = self._keeps_whole and gradient.dtype is place.dtype
            if member.name in self._present[index] and not is_added_by_backward:
                place.add_(gradient)
            else:
                place.copy_(gradient)
                self._present[index].add(member.name)
            member.parameter.grad = place if is_added_by_backward else None
        self._missing[index].discard(member.name)
        if not self._missing[index]:
            self._filled(self._buckets[index])
            if self._arrivals is not None:
                self._arrivals.append(index)
            self._send_complete()

    def _send_complete(self) -> None:
        while self._sends and self._num_sent < len(self._buckets) and not self._missing[self._order[self._num_sent]]:
            self._send_next()

    def _send_next(self) -> None:
        index = self._order[self._num_sent]
        bucket, buffer = self._buckets[index], self._buffers[index]
        self._before_sending(bucket)
        if buffer is None:
            buffer = self._spare.take(bucket)
        for member in bucket.members:
            if member.name not in self._present[index]:
                bucket.view(buffer, member).zero_()
        while self._in_flight and (
            len(self._in_flight) >= MAX_BUCKETS_IN_FLIGHT or self._in_flight[0].sum.work.is_completed()
        ):
            self._finish_oldest()
        received = self._spare.take(bucket) if self._exchanges else None
        started = start_sum(buffer, bucket.own(buffer), received, self._group)
        adds = not (self._keeps_whole or self._is_first)
        self._in_flight.append(_InFlight(index, started, adds, buffer, received))
        self._num_sent += 1
        if not self._keeps_whole:
            self._buffers[index] = None

    def _finish_oldest(self) -> None:
        oldest = self._in_flight.popleft()
        oldest.sum.finish(self.own[oldest.index], adds=oldest.adds)
        if oldest.received is not None:
            self._spare.give(oldest.received)
        if not self._keeps_whole:
            self._spare.give(oldest.buffer)


def _accumulator(parameter: torch.Tensor) -> torch.autograd.graph.Node:
    """The node that every graph with the parameter ends in, which lives as long as someone has it."""
    function = parameter.view_as(parameter).grad_fn
    assert function is not None, "a bucket's parameter has a gradient"
    node = function.next_functions[0][0]
    assert node is not None, "a leaf accumulates its gradient"
    return node


@dataclass(frozen=True)
class _InFlight:
    """A bucket whose sum is under way, and the memory that this uses."""

    index: int
    sum: SliceSum
    adds: bool
    buffer: torch.Tensor
    received: torch.Tensor | None


class _SpareBuffers:
    """Memory of buckets that were sent, for the next ones: fresh memory costs a CPU a page fault every 4 KiB."""

    def __init__(self, max_elements: int) -> None:
        self._free: list[torch.Tensor] = []
        self._max_elements = max_elements

    def take(self, bucket: FlatBucket) -> torch.Tensor:
        """Uninitialised fp32 memory of a bucket's size."""
        size = bucket.flat.numel()
        if size > self._max_elements:
            return bucket.masters.new_empty(size)
        storage = self._free.pop() if self._free else bucket.masters.new_empty(self._max_elements)
        return storage[:size]

    def give(self, buffer: torch.Tensor) -> None:
        """Take memory back, unless it is of a single parameter that is larger than a bucket."""
        if buffer.numel() <= self._max_elements:
            self._free.append(buffer.new_empty(0).set_(buffer.untyped_storage()))
