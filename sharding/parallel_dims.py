"""How ranks are divided over the axes of parallelism, and the roles that follow; pure arithmetic, imports no torch.

Experts will have no axis of their own: to divide them is a second view of shard x context x tensor.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass
from itertools import product
from typing import Literal, get_args

from sharding.config import ParallelConfig
from sharding.ranks.errors import UserError

Axis = Literal["pipeline", "replicate", "shard", "context", "tensor"]

AXES: tuple[Axis, ...] = get_args(Axis)
"""All axes, outermost first: neighbouring ranks differ in ``tensor``, which needs the fastest links."""


@dataclass(frozen=True)
class Role:
    """A rank's place among the ranks that share something.

    Attributes:
        rank: place among them, from 0.
        degree: how many they are.
    """

    rank: int
    degree: int

    def takes(self, index: int = 0) -> bool:
        """Whether the index-th of many things that one of them must do, dealt out in turn, is this rank's."""
        return index % self.degree == self.rank


ALONE = Role(0, 1)
"""The place of a rank that shares it with nobody."""


@dataclass(frozen=True)
class ParallelDims:
    """Number of ranks along each axis; their product is the world size.

    Attributes:
        pipeline: stages that divide the blocks of the model.
        replicate: groups of ranks each of which shards the whole state.
        shard: ranks that divide the state and read different data.
        context: ranks that divide the sequences which they read alike; they divide the state too.
        tensor: ranks that divide single matrices.
    """

    pipeline: int = 1
    replicate: int = 1
    shard: int = 1
    context: int = 1
    tensor: int = 1

    @property
    def world_size(self) -> int:
        """Number of all ranks."""
        return self.degree(AXES)

    @property
    def data_degree(self) -> int:
        """Number of ranks that read different data."""
        return self.degree(("replicate", "shard"))

    @property
    def reduction_degree(self) -> int:
        """Number of ranks whose gradients of one parameter add up; they run the same part of the model."""
        return self.degree(("replicate", "shard", "context"))

    @property
    def sharding_degree(self) -> int:
        """Number of ranks over which a strategy divides the state."""
        return self.degree(("shard", "context"))

    @property
    def divides_model(self) -> bool:
        """Whether ranks compute with different parts of the model, so that none comes to all of its parameters."""
        return self.degree(("pipeline", "tensor")) > 1

    def size(self, axis: Axis) -> int:
        """Number of ranks along an axis."""
        sizes: dict[Axis, int] = {name: getattr(self, name) for name in AXES}
        return sizes[axis]

    def degree(self, axes: Collection[Axis]) -> int:
        """Number of ranks that differ in these axes alone."""
        return math.prod(self.size(axis) for axis in axes)

    def coordinate(self, rank: int, axis: Axis) -> int:
        """A rank's index along an axis."""
        inner = AXES[AXES.index(axis) + 1 :]
        return rank // self.degree(inner) % self.size(axis)

    def role(self, rank: int, axes: Collection[Axis]) -> Role:
        """A rank's place among the ranks that differ from it in these axes alone, in the order of ranks."""
        place = 0
        for axis in AXES:
            if axis in axes:
                place = place * self.size(axis) + self.coordinate(rank, axis)
        return Role(place, self.degree(axes))

    def peers(self, rank: int, axes: Collection[Axis]) -> list[int]:
        """The ranks that differ from a rank in these axes alone, itself included, in order."""
        coordinates = [range(self.size(axis)) if axis in axes else (self.coordinate(rank, axis),) for axis in AXES]
        return [self._rank_at(place) for place in product(*coordinates)]

    def data(self, rank: int) -> Role:
        """Place among the ranks that read different data: for loaders, seeds and the arithmetic of accumulation."""
        return self.role(rank, ("replicate", "shard"))

    def sharding(self, rank: int) -> Role:
        """Place among the ranks over which a strategy divides the state."""
        return self.role(rank, ("shard", "context"))

    def reduction(self, rank: int) -> Role:
        """Place among the ranks whose gradients of one parameter add up."""
        return self.role(rank, ("replicate", "shard", "context"))

    def holder(self, rank: int, divided_over: Collection[Axis] = ()) -> Role:
        """Place among the ranks that hold the same of a tensor; one of them writes it.

        Args:
            rank: the rank.
            divided_over: axes along which ranks hold different parts of the tensor, or one holds it and others do not.
        """
        return self.role(rank, [axis for axis in AXES if axis not in divided_over])

    def counts_loss(self, rank: int) -> bool:
        """Whether the loss that this rank computes counts; that of others is the same one, or none at all."""
        return self.coordinate(rank, "tensor") == 0 and self.coordinate(rank, "pipeline") == self.pipeline - 1

    def counts_targets(self, rank: int) -> bool:
        """Whether the targets of the sequences that this rank reads count: one rank does of those that read the same.

        Where ranks divide sequences, each counts the loss of its part, and one the targets of the whole.
        """
        return self.counts_loss(rank) and self.coordinate(rank, "context") == 0

    def first_readers(self) -> list[int]:
        """By data rank, the first of the ranks that read the same data."""
        return self.peers(0, ("replicate", "shard"))

    def _rank_at(self, place: tuple[int, ...]) -> int:
        rank = 0
        for axis, index in zip(AXES, place, strict=True):
            rank = rank * self.size(axis) + index
        return rank


def parallel_dims(parallel: ParallelConfig, world_size: int) -> ParallelDims:
    """Divide a world as the settings say; what the other axes leave is ``shard``.

    Raises:
        UserError: the degrees do not divide the number of ranks.
    """
    degrees = {
        "parallel.pipeline": parallel.pipeline,
        "parallel.replicate": parallel.replicate,
        "parallel.context": parallel.context,
        "parallel.tensor": parallel.tensor,
    }
    num_others = math.prod(degrees.values())
    if world_size % num_others:
        factors = " x ".join(f"{name}={degree}" for name, degree in degrees.items() if degree > 1)
        raise UserError(
            f"{factors} = {num_others} does not divide {world_size} ranks; start {num_others} ranks or a multiple, or "
            "lower one of them."
        )
    return ParallelDims(
        pipeline=parallel.pipeline,
        replicate=parallel.replicate,
        shard=world_size // num_others,
        context=parallel.context,
        tensor=parallel.tensor,
    )
