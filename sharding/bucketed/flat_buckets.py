"""Parameters as views of flat buckets, each divided into one equal slice per rank."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from sharding.parallel_dims import Role

_ALIGNMENT = 16
"""Elements; 64 bytes, a cache line and what vector instructions like best."""


@dataclass(frozen=True)
class BucketMember:
    """A parameter and where it begins in its bucket, in elements."""

    name: str
    parameter: nn.Parameter
    offset: int


@dataclass(frozen=True)
class FlatBucket:
    """Some parameters in one piece of memory.

    Attributes:
        members: the parameters; between them may lie unused elements.
        flat: the values of all of them, [size]; the parameters are views of it.
        masters: this rank's slice, fp32 [length]: a view of ``flat``, or memory of its own where ``flat`` can be freed.
        first: position of this rank's slice.
        length: elements of each rank's slice; size / ranks.
    """

    members: tuple[BucketMember, ...]
    flat: torch.Tensor
    masters: torch.Tensor
    first: int
    length: int

    @property
    def is_whole(self) -> bool:
        """Whether ``flat`` has memory."""
        return self.flat.untyped_storage().size() > 0

    def allocate(self) -> None:
        """Give ``flat`` memory, in which there is anything; every view of it is there again."""
        self.flat.untyped_storage().resize_(self.flat.numel() * self.flat.element_size())

    def free(self) -> None:
        """Give the memory of ``flat`` back; what autograd saved of it must not be read until it is there again."""
        self.flat.untyped_storage().resize_(0)

    def own(self, flat: torch.Tensor) -> torch.Tensor:
        """This rank's slice of memory that is laid out as the bucket."""
        return flat[self.first : self.first + self.length]

    def view(self, flat: torch.Tensor, member: BucketMember) -> torch.Tensor:
        """A member's place, in its shape, in memory that is laid out as the bucket."""
        return flat[member.offset : member.offset + member.parameter.numel()].view(member.parameter.shape)

    def run(self, member: BucketMember) -> tuple[int, int, int]:
        """This rank's run of a member: its offset and size in the own slice, and its start in the parameter."""
        begin = max(self.first, member.offset)
        end = min(self.first + self.length, member.offset + member.parameter.numel())
        if end <= begin:
            return 0, 0, 0
        return begin - self.first, end - begin, begin - member.offset


def flatten_parameters(
    parameters: Sequence[tuple[str, nn.Parameter]],
    place: Role,
    max_elements: int,
    freed_as: torch.dtype | None = None,
) -> list[FlatBucket]:
    """Move parameters into flat buckets, last first: the order in which backward is done with them.

    Args:
        parameters: names and parameters, whole, in the order of the forward pass; each becomes a view of its bucket.
        place: this rank's among the ranks that divide each bucket.
        max_elements: largest size of a bucket, unless one parameter alone is larger.
        freed_as: if given, each rank keeps the values of its slices alone, and ``flat`` is in this format and without
            memory until it is gathered.
    """
    # Room for the slices of all ranks to be of equal, aligned length.
    max_elements -= place.degree * _ALIGNMENT
    buckets: list[FlatBucket] = []
    open_members: list[BucketMember] = []
    end = 0
    for name, parameter in reversed(parameters):
        size = _aligned(parameter.numel(), _ALIGNMENT)
        if open_members and end + size > max_elements:
            buckets.append(_bucket(open_members, end, place, freed_as))
            open_members, end = [], 0
        open_members.append(BucketMember(name, parameter, end))
        end += size
    if open_members:
        buckets.append(_bucket(open_members, end, place, freed_as))
    return buckets


@torch.no_grad()
def _bucket(members: list[BucketMember], size: int, place: Role, freed_as: torch.dtype | None) -> FlatBucket:
    rank, num_ranks = place.rank, place.degree
    length = _aligned(-(-size // num_ranks), _ALIGNMENT)
    first = members[0].parameter
    flat = torch.zeros(length * num_ranks, dtype=first.dtype, device=first.device)
    masters = flat[rank * length : (rank + 1) * length]
    bucket = FlatBucket(tuple(members), flat, masters, rank * length, length)
    for member in members:
        bucket.view(flat, member).copy_(member.parameter)
    if freed_as is not None:
        bucket = replace(bucket, flat=torch.empty_like(flat, dtype=freed_as), masters=masters.clone())
    for member in members:
        # The same parameter as before, with other memory: ties and hooks stay.
        member.parameter.data = bucket.view(bucket.flat, member)
    if freed_as is not None:
        bucket.free()
    return bucket


def _aligned(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
