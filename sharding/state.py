"""Canonical state: every tensor by name, as the parts that ranks hold; and a hash of it that knows no layout."""

import hashlib
import math
from collections.abc import Iterator, Sequence

import torch

from sharding.engine import Engine
from sharding.part import Box, Part
from sharding.ranks.object_exchange import sum_integers_over_ranks
from sharding.ranks.process_group import Ranks

MODEL_PREFIX = "model/"

AVERAGE_PREFIX = "ema/"

MASK_PREFIX = "mask/"

SQUARE_PREFIX = "square/"

PROJECTIONS = "distillation_projections"
"""Child of a model that only training calls: what makes outputs of its blocks as wide as a teacher's."""

_HASH_CHUNK = 1 << 22


def is_projection(name: str) -> bool:
    """Whether a tensor of a model, by its name there, is one that only learning from a teacher needs."""
    return name.startswith(f"{PROJECTIONS}.")


def frozen_names(engine: Engine) -> set[str]:
    """Names in the canonical state of the parameters that are not trained; every rank must call it."""
    return {f"{MODEL_PREFIX}{name}" for name, parameter in engine.named_parameters() if not parameter.requires_grad}


def hash_over_ranks(parts: Sequence[Part], ranks: Ranks) -> int:
    """A 64-bit hash of values that knows no layout, see ``layout_independent_hash``; every rank must call it.

    Args:
        parts: this rank's.
        ranks: this rank's place.
    """
    return sum_integers_over_ranks(layout_independent_hash(parts), ranks) % (1 << 64)


def layout_independent_hash(parts: Sequence[Part]) -> int:
    """This rank's addend of a 64-bit hash of values by name and global index.

    The sum over all ranks, modulo 2^64, is the same for every division of the tensors over ranks: each element that is
    written contributes a mix of its bits, its index in the flattened whole and its tensor's name.
    """
    total = 0
    for part in parts:
        if not part.is_written_here:
            continue
        key = name_key(part.name)
        for box, piece in part.pieces():
            for bits, indices in _elements(piece, box, part.global_shape):
                mixed = (bits * 0x9E3779B97F4A7C1 + indices) * 0xBF58476D1CE4E5B + key
                mixed = (mixed ^ (mixed >> 29)) * 0x94D049BB133111E
                mixed = mixed ^ (mixed >> 32)
                total += int(mixed.sum().item())
    return (total + (1 << 63)) % (1 << 64) - (1 << 63)


def name_key(name: str) -> int:
    """A number of 56 bits that stands for a tensor's name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "little")


def _elements(piece: torch.Tensor, box: Box, whole: tuple[int, ...]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Bits of a box's elements and their indices in the flattened whole, in bounded chunks."""
    flat = piece.contiguous().reshape(-1)
    integer = {4: torch.int32, 2: torch.int16, 8: torch.int64, 1: torch.uint8}[flat.element_size()]
    bits = flat.view(integer)
    for begin in range(0, bits.numel(), _HASH_CHUNK):
        chunk = bits[begin : begin + _HASH_CHUNK].to(torch.int64)
        yield chunk, element_indices(torch.arange(begin, begin + chunk.numel(), device=chunk.device), box, whole)


def element_indices(positions: torch.Tensor, box: Box, whole: tuple[int, ...]) -> torch.Tensor:
    """Indices in the flattened whole of elements of a box.

    Args:
        positions: of the elements in the flattened box, int64, any shape.
        box: which elements of the whole it has.
        whole: shape of the whole tensor.
    """
    # Neighbouring dims of which the box has all but the outermost whole count as one: most boxes are runs.
    groups: list[tuple[int, int]] = []
    size, extent, stride = 1, 1, 1
    for box_size, whole_size in zip(reversed(box.shape), reversed(whole), strict=True):
        if size == extent:
            size, extent = size * box_size, extent * whole_size
        elif box_size > 1:
            groups.append((size, stride))
            size, extent, stride = box_size, whole_size, stride * extent
        else:
            extent *= whole_size
    indices: torch.Tensor | int = sum(offset * math.prod(whole[dim + 1 :]) for dim, offset in enumerate(box.offsets))
    for size_of_group, stride_of_group in groups:
        indices = indices + positions % size_of_group * stride_of_group
        positions = positions // size_of_group
    return indices + positions * stride
