"""Tensors that lie in a file, and what is made of them, of which only the parts that are asked for are read."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from sharding.part import Box, whole_box

aten = torch.ops.aten

Reader = Callable[[Box], torch.Tensor]
"""Reads a box that is not empty, as a plain tensor on the CPU."""


class StoredTensor(torch.Tensor):
    """A tensor without memory that knows how to read any box of itself.

    Code that joins, stacks, cuts and transposes tensors, such as the conversions of `transformers`, works on these as
    on any other and reads nothing; what it makes is one of these again. Another operation is done on the whole tensors,
    each time that a box of its result is read.
    """

    read: Reader
    """Reads a box of it, in its own type."""

    @staticmethod
    def __new__(cls, shape: Sequence[int], dtype: torch.dtype, read: Reader) -> "StoredTensor":
        """A tensor by its size and what reads it."""
        make: Any = torch.Tensor._make_wrapper_subclass
        made: StoredTensor = make(cls, tuple(shape), dtype=dtype, device="cpu")
        made.read = read
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        """Its size; its elements stay unread."""
        return f"StoredTensor({list(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Say how large the results of an operation are, and how to read them."""
        given = (args, kwargs or {})
        meta = _with_tensors(given, lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta"))
        leaves, structure = pytree.tree_flatten(func(*meta[0], **meta[1]))
        rule = _RULES.get(func)
        readers = rule(*args, **(kwargs or {})) if rule else [_computed(func, given, i) for i in range(len(leaves))]
        made = [StoredTensor(leaf.shape, leaf.dtype, read) for leaf, read in zip(leaves, readers, strict=True)]
        return pytree.tree_unflatten(made, structure)


def _with_tensors(given: Any, make: Callable[[StoredTensor], torch.Tensor]) -> Any:
    return pytree.tree_map_only(StoredTensor, make, given)


def _computed(func: Any, given: Any, index: int) -> Reader:
    """The index-th result of any operation, from whole tensors."""

    def read(box: Box) -> torch.Tensor:
        args, kwargs = _with_tensors(given, lambda t: t.read(whole_box(tuple(t.shape))).contiguous())
        result: torch.Tensor = pytree.tree_leaves(func(*args, **kwargs))[index]
        return result[box.slices]

    return read


def _joined(tensors: Sequence[StoredTensor], dim: int = 0) -> list[Reader]:
    dim %= tensors[0].ndim

    def read(box: Box) -> torch.Tensor:
        parts, start = [], 0
        for tensor in tensors:
            offset = box.offsets[dim] - start
            first, last = max(offset, 0), min(offset + box.shape[dim], tensor.shape[dim])
            if first < last:
                parts.append(tensor.read(box.along(dim, first, last - first)))
            start += tensor.shape[dim]
        return torch.cat(parts, dim=dim)

    return [read]


def _stacked(tensors: Sequence[StoredTensor], dim: int = 0) -> list[Reader]:
    dim %= tensors[0].ndim + 1

    def read(box: Box) -> torch.Tensor:
        inner = box.without(dim)
        return torch.stack([tensor.read(inner) for tensor in tensors[box.slices[dim]]], dim=dim)

    return [read]


def _transposed(tensor: StoredTensor, dim0: int, dim1: int) -> list[Reader]:
    def read(box: Box) -> torch.Tensor:
        swapped = box.along(dim0, box.offsets[dim1], box.shape[dim1]).along(dim1, box.offsets[dim0], box.shape[dim0])
        return tensor.read(swapped).transpose(dim0, dim1)

    return [read]


def _parts(tensor: StoredTensor, sizes: Sequence[int], dim: int = 0) -> list[Reader]:
    dim %= tensor.ndim

    def reader(start: int) -> Reader:
        def read(box: Box) -> torch.Tensor:
            return tensor.read(box.along(dim, box.offsets[dim] + start, box.shape[dim]))

        return read

    return [reader(sum(sizes[:index])) for index in range(len(sizes))]


def _equal_parts(tensor: StoredTensor, size: int, dim: int = 0) -> list[Reader]:
    return _parts(tensor, [size] * -(-tensor.shape[dim] // size), dim)


# Each as its operation, with readers of the results in place of these.
_RULES: dict[Any, Callable[..., list[Reader]]] = {
    aten.cat.default: _joined,
    aten.stack.default: _stacked,
    aten.transpose.int: _transposed,
    aten.split.Tensor: _equal_parts,
    aten.split_with_sizes.default: _parts,
}
