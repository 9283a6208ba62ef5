"""Parts of tensors: what one rank holds of each, where that lies in the whole, and who else holds it."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from sharding.parallel_dims import ALONE, Role


@dataclass(frozen=True)
class Box:
    """Elements of a tensor: along each dim those from ``offsets`` on, ``shape`` many.

    Attributes:
        offsets: index of its first element, per dim.
        shape: elements per dim; none of them is 0 unless the whole tensor has no elements.
    """

    offsets: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def along(self, dim: int, offset: int, size: int) -> "Box":
        """The same box but for one dim, of which it takes ``size`` elements from ``offset`` on."""
        return Box(
            (*self.offsets[:dim], offset, *self.offsets[dim + 1 :]), (*self.shape[:dim], size, *self.shape[dim + 1 :])
        )

    def without(self, dim: int) -> "Box":
        """The box of the other dims."""
        return Box((*self.offsets[:dim], *self.offsets[dim + 1 :]), (*self.shape[:dim], *self.shape[dim + 1 :]))

    @property
    def slices(self) -> tuple[slice, ...]:
        """What indexes the box in the whole tensor."""
        return tuple(slice(first, first + size) for first, size in zip(self.offsets, self.shape, strict=True))


@dataclass(frozen=True)
class Part:
    """What this rank holds of one tensor; there is one for each name, also where it holds nothing.

    Attributes:
        name: ``model/PARAMETER``, ``optimizer/PARAMETER/MOMENT`` or ``scaler/NAME`` in the canonical state; the
            parameter's own name where an optimizer is given it.
        tensor: this rank's live memory; writing to it changes the state. It has the shape of the box where there is
            one, and else the elements of all boxes one after another, contiguous, in any shape.
        global_shape: shape of the whole tensor.
        boxes: where its elements lie in the whole, in order; none where this rank has no elements.
        holders: this rank's place among the ranks that hold the same elements.
        writer: which of the holders, counted on and on, writes it to a checkpoint.
        sums_over: the ranks over which sums over the whole tensor add up, each holding elements that the others do not;
            None where this rank has all.
    """

    name: str
    tensor: torch.Tensor
    global_shape: tuple[int, ...]
    boxes: tuple[Box, ...]
    holders: Role = ALONE
    writer: int = 0
    sums_over: dist.ProcessGroup | None = None

    @property
    def num_bytes(self) -> int:
        """Size in memory and on disk."""
        return self.tensor.numel() * self.tensor.element_size()

    @property
    def is_written_here(self) -> bool:
        """Whether this rank is the one that writes the part to a checkpoint."""
        return self.holders.takes(self.writer) and bool(self.boxes)

    @property
    def rows(self) -> range | None:
        """Indices of the rows (slices of dim 0) that the part consists of; None where it has rows in pieces."""
        if not self.global_shape:
            return None
        if not self.boxes:
            return range(0)
        first = self.boxes[0]
        if len(self.boxes) > 1 or first.shape[1:] != self.global_shape[1:]:
            return None
        return range(first.offsets[0], first.offsets[0] + first.shape[0])

    def pieces(self) -> Iterator[tuple[Box, torch.Tensor]]:
        """Each box with its elements, [shape of the box]; views of the part's memory."""
        if len(self.boxes) == 1 and self.tensor.shape == self.boxes[0].shape:
            yield self.boxes[0], self.tensor
            return
        flat, position = self.tensor.view(-1), 0
        for box in self.boxes:
            yield box, flat[position : position + box.num_elements].view(box.shape)
            position += box.num_elements

    def beside(self, name: str, tensor: torch.Tensor) -> "Part":
        """Another tensor that lies on ranks as this one does: element for element, or row for row.

        Args:
            name: its name.
            tensor: this rank's memory of it, of this part's shape, or with as many rows of another shape.

        Raises:
            ValueError: it has another shape, and this part is not of whole rows.
        """
        if tensor.shape == self.tensor.shape:
            return replace(self, name=name, tensor=tensor)
        rows = self.rows
        if rows is None or not tensor.ndim or len(tensor) != len(rows):
            raise ValueError(f"{name} of shape {list(tensor.shape)} does not lie as {self.name} does")
        row_shape = tuple(tensor.shape[1:])
        boxes = (Box((rows.start, *(0 for _ in row_shape)), tuple(tensor.shape)),) if self.boxes else ()
        return replace(self, name=name, tensor=tensor, global_shape=(self.global_shape[0], *row_shape), boxes=boxes)


def whole_box(shape: tuple[int, ...]) -> Box:
    """All elements of a tensor."""
    return Box((0,) * len(shape), shape)


def whole_part(name: str, tensor: torch.Tensor) -> Part:
    """A plain tensor of which this rank alone has all; the tensor itself, and not its values alone."""
    shape = tuple(tensor.shape)
    return Part(name, tensor, shape, (whole_box(shape),))


def part_of(
    name: str,
    tensor: torch.Tensor,
    holders: Role = ALONE,
    writer: int = 0,
    sums_over: dist.ProcessGroup | None = None,
) -> Part:
    """Describe a plain tensor, the whole, or a DTensor, of which this rank has a shard; see Part."""
    shape = tuple(tensor.shape)
    if not isinstance(tensor, DTensor):
        return Part(name, tensor.detach(), shape, (whole_box(shape),), holders, writer, sums_over)
    _, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    local = local_tensor(tensor.detach())
    boxes = (Box(tuple(offsets), tuple(local.shape)),) if local.numel() else ()
    return Part(name, local, shape, boxes, holders, writer, sums_over)


def part_of_run(
    name: str,
    flat: torch.Tensor,
    global_shape: tuple[int, ...],
    start: int,
    sums_over: dist.ProcessGroup | None = None,
) -> Part:
    """Describe a run of a tensor's elements in row-major order, as flat partitions hold them; no other rank has them.

    Args:
        name: the tensor's name.
        flat: live memory, [number of elements], contiguous.
        global_shape: shape of the whole tensor.
        start: position of the first element in the flattened tensor.
        sums_over: see Part.

    Returns:
        A part of at most ``2 * dims - 1`` boxes, for example the end of one row, whole rows, and the beginning of
        another.
    """
    return Part(
        name, flat, global_shape, tuple(boxes_of_run(global_shape, start, start + flat.numel())), sums_over=sums_over
    )


def boxes_of_run(shape: tuple[int, ...], start: int, stop: int) -> list[Box]:
    """The boxes that make up elements [start, stop) of a row-major tensor, in order."""
    if start >= stop:
        return []
    if not shape:
        return [Box((), ())]
    row = math.prod(shape[1:])
    first, last = start // row, stop // row
    if start % row == 0 and stop % row == 0:
        return [Box((first, *(0 for _ in shape[1:])), (last - first, *shape[1:]))]
    if first == (stop - 1) // row:
        inside = boxes_of_run(shape[1:], start - first * row, stop - first * row)
        return [Box((first, *box.offsets), (1, *box.shape)) for box in inside]
    head_stop = first * row if start % row == 0 else (first + 1) * row
    return [
        *boxes_of_run(shape, start, head_stop),
        *boxes_of_run(shape, head_stop, last * row),
        *boxes_of_run(shape, last * row, stop),
    ]


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's memory of a tensor, sharded or not."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
