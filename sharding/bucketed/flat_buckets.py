"""Parameters as views of flat buckets, each divided into one equal slice per rank."""

from collections.abc import Sequence
from dataclasses import dataclass

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
        flat: the values of all of them as the model computes with them, [size]; the parameters are views of it.
        masters: this rank's slice, fp32 [length]: a view of ``flat``, or memory of its own where ``flat`` is freed
            between uses or has another format.
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

    def take_masters(self) -> torch.Tensor:
        """This rank's slice of ``flat``, with the values of the masters."""
        own = self.own(self.flat)
        if own.data_ptr() != self.masters.data_ptr():
            own.copy_(self.masters)
        return own

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
    dtype: torch.dtype = torch.float32,
    *,
    is_freed: bool = False,
) -> list[FlatBucket]:
    """Move parameters into flat buckets, last first: the order in which backward is done with them.

    Args:
        parameters: names and parameters, whole, of one format, in the order of the forward pass; each becomes a view of
            its bucket.
        place: this rank's among the ranks that divide each bucket.
        max_elements: largest size of a bucket, unless one parameter alone is larger.
        dtype: format of ``flat``; of masters it is that of the parameters.
        is_freed: whether ``flat`` is without memory until it is gathered.
    """
    # Room for the slices of all ranks to be of equal, aligned length.
    max_elements -= place.degree * _ALIGNMENT
    buckets: list[FlatBucket] = []
    open_members: list[BucketMember] = []
    end = 0
    for name, parameter in reversed(parameters):
        size = _aligned(parameter.numel(), _ALIGNMENT)
        if open_members and end + size > max_elements:
            buckets.append(_bucket(open_members, end, place, dtype, is_freed=is_freed))
            open_members, end = [], 0
        open_members.append(BucketMember(name, parameter, end))
        end += size
    if open_members:
        buckets.append(_bucket(open_members, end, place, dtype, is_freed=is_freed))
    return buckets


@torch.no_grad()
def _bucket(members: list[BucketMember], size: int, place: Role, dtype: torch.dtype, *, is_freed: bool) -> FlatBucket:
    rank, num_ranks = place.rank, place.degree
    length = _aligned(-(-size // num_ranks), _ALIGNMENT)
    first = members[0].parameter
    whole = torch.zeros(length * num_ranks, dtype=first.dtype, device=first.device)
    for member in members:
        whole[member.offset : member.offset + member.parameter.numel()] = member.parameter.flatten()
    masters, flat = whole[rank * length : (rank + 1) * length], whole
    if is_freed or dtype is not first.dtype:
        masters, flat = masters.clone(), whole.to(dtype)
    bucket = FlatBucket(tuple(members), flat, masters, rank * length, length)
    for member in members:
        # The same parameter as before, with other memory: ties and hooks stay.
        member.parameter.data = bucket.view(flat, member)
    if is_freed:
        bucket.free()
    return bucket


def _aligned(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
