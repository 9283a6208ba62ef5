"""Values that several ranks should hold alike, and a hash that tells whether they do."""

import hashlib
from collections.abc import Sequence

import torch

from sharding.part import Part

# Stays in a core's cache; on a GPU, few launches count for more.
_CPU_CHUNK, _GPU_CHUNK = 1 << 18, 1 << 22


def layout_hash(parts: Sequence[Part]) -> int:
    """A signed 64-bit hash of which elements parts hold: ranks that have the same one should hold the same values."""
    layout = [(part.name, part.global_shape, [(box.offsets, box.shape) for box in part.boxes]) for part in parts]
    return int.from_bytes(hashlib.sha256(repr(layout).encode()).digest()[:8], "little", signed=True)


def content_hashes(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """A hash of the bits of each tensor, int64 [tensors], on their device.

    Each element's bits, an integer, are multiplied by an odd number that belongs to its place and added up modulo 2^64
    (multilinear hashing: Carter and Wegman, 1979). An odd factor has an inverse, so one element that differs always
    changes the sum, whichever bits of it do; several that differ cancel out only by a chance of about 2^-64.
    """
    hashes: list[torch.Tensor] = []
    factors: torch.Tensor | None = None
    for tensor in tensors:
        if factors is None:
            factors = _odd_factors(tensor.device)
        hashes.append(_content_hash(tensor.detach(), factors))
    return torch.stack(hashes) if hashes else torch.zeros(0, dtype=torch.int64)


def _content_hash(tensor: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    flat = tensor.contiguous().reshape(-1)
    bits = flat.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, bits.numel(), len(factors)):
        chunk = bits[start : start + len(factors)]
        # The place of a chunk in the tensor counts by another odd factor.
        total = total * 0x9E3779B97F4A7C5 + (factors[: chunk.numel()] * chunk).sum()
    return total


def _odd_factors(device: torch.device) -> torch.Tensor:
    """Odd numbers without a pattern, int64 [chunk]: splitmix64 (Steele et al., 2014) of each place."""
    size = _CPU_CHUNK if device.type == "cpu" else _GPU_CHUNK
    mixed = torch.arange(1, size + 1, dtype=torch.int64, device=device) * -0x61C8864680B583EB
    mixed = (mixed ^ (mixed >> 30)) * -0x40A7B892E31B1A47
    mixed = (mixed ^ (mixed >> 27)) * -0x6B2FB644ECCEEE15
    return (mixed ^ (mixed >> 31)) | 1
