"""What stages 2 and 3 send beyond what DDP sends, and nothing else: the least that they take longer."""

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.contestants.contest import Contest, Contestant, StepLog
from benchmarks.measure.turns import StepEdge
from sharding.blocks import find_blocks
from sharding.config import Strategy
from sharding.flat_collectives import SliceSum, exchanges_slices, start_gather, start_sum
from sharding.memory_formula import MAX_BUCKETS_IN_FLIGHT, bucket_elements


class ExtraCollectives(Contestant):
    """Sums and gatherings of a step beyond DDP's, in buckets, some under way at a time; no model, no arithmetic.

    DDP sums all gradients once a step, and what is summed is everywhere: a sum of slices and a gathering of all. Beyond
    that stage 2 sums once more for each further micro-batch. Stage 3 does so too, and gathers a block anew for each
    pass: all of them but the first, which stays, as what is in no block does, and the last, with which the backward
    pass begins. Sums are fp32, gatherings in the format of matrix products.
    """

    name = "extra collectives"
    trains = False

    def __init__(self, contest: Contest, strategy: Strategy) -> None:
        """Take memory for the largest pieces.

        Args:
            contest: what all share.
            strategy: zero2 or zero3.
        """
        device, world_size = contest.ranks.device, contest.ranks.world_size
        self._limit = bucket_elements(device.type, world_size)
        self._num_steps = contest.num_steps
        model = contest.build_model()
        blocks = [sum(p.numel() for p in block.parameters()) for _, block in find_blocks(model)]
        num_elements = sum(p.numel() for p in model.parameters())
        self._sums = self._pieces([num_elements] * (contest.accumulation_steps - 1))
        # Of a step: the first block once, and the others for both passes of each micro-batch, the last one for one.
        passes = [2 * contest.accumulation_steps] * len(blocks)
        passes[-1] = contest.accumulation_steps
        passes[0] = 1
        gathered = [size for size, num in zip(blocks, passes, strict=True) for _ in range(num - 1)]
        self._gathers = self._pieces(gathered) if strategy == "zero3" else []
        largest = max([world_size, *self._sums, *self._gathers]) + world_size
        self._flat = [torch.zeros(largest, device=device) for _ in range(MAX_BUCKETS_IN_FLIGHT)]
        self._received = [torch.zeros_like(one) if exchanges_slices(None) else None for one in self._flat]
        self._own = torch.zeros(largest // world_size + 1, device=device)
        self._to_gather = [one.to(contest.compute_dtype) for one in self._flat]
        self._world_size, self._rank = world_size, contest.ranks.rank
        self.settings: dict[str, Any] = {
            "summed_elements": sum(self._sums),
            "gathered_elements": sum(self._gathers),
            "bucket_elements": self._limit,
            "in_flight": MAX_BUCKETS_IN_FLIGHT,
        }

    def run(self, step_edge: StepEdge) -> None:
        """See Contestant."""
        for _ in range(self._num_steps):
            self._in_flight(self._gathers, self._start_gather)
            self._in_flight(self._sums, self._start_sum)
            step_edge()

    def step_log(self) -> StepLog:
        """See Contestant; nothing is learnt here."""
        return StepLog()

    def _pieces(self, sizes: list[int]) -> list[int]:
        """Sizes of the buckets that parameters of so many elements travel in, each a multiple of the ranks."""
        return [min(self._limit, size - begin) for size in sizes for begin in range(0, size, self._limit)]

    def _in_flight(self, sizes: list[int], start: Callable[[int, int], Callable[[], None]]) -> None:
        """Issue collectives one after another, so many under way at a time."""
        waits: list[Callable[[], None]] = []
        for index, size in enumerate(sizes):
            if len(waits) == MAX_BUCKETS_IN_FLIGHT:
                waits.pop(0)()
            waits.append(start(index % MAX_BUCKETS_IN_FLIGHT, -(-size // self._world_size)))
        for wait in waits:
            wait()

    def _start_sum(self, place: int, length: int) -> Callable[[], None]:
        flat, received = self._flat[place][: length * self._world_size], self._received[place]
        own = flat[self._rank * length : (self._rank + 1) * length]
        slices = None if received is None else received[: len(flat)]
        under_way: SliceSum = start_sum(flat, own, slices, None)
        return lambda: under_way.finish(self._own[:length], adds=True)

    def _start_gather(self, place: int, length: int) -> Callable[[], None]:
        flat = self._to_gather[place][: length * self._world_size]
        works = start_gather(flat, flat[self._rank * length : (self._rank + 1) * length], None)

        def wait() -> None:
            for work in works:
                work.wait()

        return wait
