"""Canonical state: every tensor by name, with its global shape and this rank's slice of it."""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


@dataclass(frozen=True)
class TensorSlice:
    """This rank's part of one tensor of the canonical state.

    Attributes:
        name: ``model/PARAMETER`` or ``optimizer/PARAMETER/MOMENT``.
        tensor: the live local memory; writing to it changes the state.
        global_shape: shape of the whole tensor.
        offsets: index of the slice's first element in the whole tensor, per dim.
        is_written_here: whether this rank is the one that writes the slice to a checkpoint.
    """

    name: str
    tensor: torch.Tensor
    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]
    is_written_here: bool

    @property
    def num_bytes(self) -> int:
        """Size of the slice in memory and on disk."""
        return self.tensor.numel() * self.tensor.element_size()


def slice_of(name: str, tensor: torch.Tensor, *, is_written_here: bool) -> TensorSlice:
    """Describe a plain tensor (the whole) or a DTensor (this rank's shard)."""
    if not isinstance(tensor, DTensor):
        return TensorSlice(name, tensor.detach(), tuple(tensor.shape), (0,) * tensor.ndim, is_written_here)
    _, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    local = local_tensor(tensor.detach())
    return TensorSlice(name, local, tuple(tensor.shape), tuple(offsets), is_written_here and local.numel() > 0)


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's memory of a tensor, sharded or not."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


_HASH_CHUNK = 1 << 22


def layout_independent_hash(slices: list[TensorSlice]) -> int:
    """This rank's addend of a 64-bit hash of values by name and global index.

    The sum over all ranks that write their slices, modulo 2^64, is the same for every division of the tensors over
    ranks: each element contributes a mix of its bits, its global index and its tensor's name.
    """
    total = 0
    for part in slices:
        if not part.is_written_here:
            continue
        key = _name_key(part.name)
        for bits, indices in _elements(part):
            mixed = (bits * 0x9E3779B97F4A7C1 + indices) * 0xBF58476D1CE4E5B + key
            mixed = (mixed ^ (mixed >> 29)) * 0x94D049BB133111E
            mixed = mixed ^ (mixed >> 32)
            total += int(mixed.sum().item())
    return (total + (1 << 63)) % (1 << 64) - (1 << 63)


def _name_key(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "little")


def _elements(part: TensorSlice) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Bits and global linear indices of a slice, in bounded chunks; only dim 0 may be divided."""
    flat = part.tensor.contiguous().reshape(-1)
    integer = {4: torch.int32, 2: torch.int16, 8: torch.int64, 1: torch.uint8}[flat.element_size()]
    bits = flat.view(integer)
    row = math.prod(part.global_shape[1:])
    start = part.offsets[0] * row if part.offsets else 0
    for begin in range(0, bits.numel(), _HASH_CHUNK):
        chunk = bits[begin : begin + _HASH_CHUNK].to(torch.int64)
        yield chunk, torch.arange(start + begin, start + begin + chunk.numel(), device=chunk.device)
