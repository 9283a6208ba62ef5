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
    """A part of one tensor of the canonical state that this rank holds; it may hold several of one tensor.

    Attributes:
        name: ``model/PARAMETER``, ``optimizer/PARAMETER/MOMENT`` or ``scaler/NAME``.
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


def slices_of_flat_range(
    name: str, flat: torch.Tensor, global_shape: tuple[int, ...], start: int, *, is_written_here: bool
) -> list[TensorSlice]:
    """Describe a run of a tensor's elements in row-major order, as flat partitions hold them, by boxes.

    Args:
        name: the tensor's name.
        flat: live memory, [number of elements], contiguous.
        global_shape: shape of the whole tensor.
        start: position of the first element in the flattened tensor.
        is_written_here: see TensorSlice.

    Returns:
        At most ``2 * dims - 1`` boxes, for example the end of one row, whole rows, and the beginning of another; their
        tensors are views of ``flat``.
    """
    boxes = _boxes(global_shape, start, start + flat.numel())
    slices, position = [], 0
    for offsets, shape in boxes:
        size = math.prod(shape)
        tensor = flat[position : position + size].view(shape)
        slices.append(TensorSlice(name, tensor, global_shape, offsets, is_written_here))
        position += size
    return slices


_Box = tuple[tuple[int, ...], tuple[int, ...]]


def _boxes(shape: tuple[int, ...], start: int, stop: int) -> list[_Box]:
    """Offsets and shapes of the boxes that make up elements [start, stop) of a row-major tensor, in order."""
    if start >= stop:
        return []
    if not shape:
        return [((), ())]
    row = math.prod(shape[1:])
    first, last = start // row, stop // row
    if start % row == 0 and stop % row == 0:
        return [((first, *(0 for _ in shape[1:])), (last - first, *shape[1:]))]
    if first == (stop - 1) // row:
        return _inside_row(shape, first, start - first * row, stop - first * row)
    head_stop = first * row if start % row == 0 else (first + 1) * row
    return [
        *_boxes(shape, start, head_stop),
        *_boxes(shape, head_stop, last * row),
        *_boxes(shape, last * row, stop),
    ]


def _inside_row(shape: tuple[int, ...], row: int, start: int, stop: int) -> list[_Box]:
    return [((row, *offsets), (1, *box)) for offsets, box in _boxes(shape[1:], start, stop)]


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
    """Bits and global linear indices of a slice, in bounded chunks; its elements must be a run of the whole's."""
    flat = part.tensor.contiguous().reshape(-1)
    integer = {4: torch.int32, 2: torch.int16, 8: torch.int64, 1: torch.uint8}[flat.element_size()]
    bits = flat.view(integer)
    start = sum(offset * math.prod(part.global_shape[dim + 1 :]) for dim, offset in enumerate(part.offsets))
    for begin in range(0, bits.numel(), _HASH_CHUNK):
        chunk = bits[begin : begin + _HASH_CHUNK].to(torch.int64)
        yield chunk, torch.arange(start + begin, start + begin + chunk.numel(), device=chunk.device)


MODEL_PREFIX = "model/"

AVERAGE_PREFIX = "ema/"
