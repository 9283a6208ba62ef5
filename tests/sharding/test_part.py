"""Parts of tensors: where their elements lie, who writes them, and what they add up to, however a whole is divided."""

import math
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from sharding.config import ParallelConfig
from sharding.gradient_norm import square_sum
from sharding.mesh import build_mesh
from sharding.parallel_dims import ParallelDims, Role
from sharding.part import Box, Part, boxes_of_run, part_of, part_of_run, whole_box, whole_part
from sharding.ranks.process_group import Ranks
from sharding.replicas import layout_hash
from sharding.state import layout_independent_hash
from tests.support import run_on_ranks

_SHAPES = st.lists(st.integers(1, 5), min_size=0, max_size=4).map(tuple)


def _values(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _part_of_boxes(whole: torch.Tensor, boxes: list[Box]) -> Part:
    memory = torch.cat([whole[box.slices].reshape(-1) for box in boxes]) if boxes else whole.new_empty(0)
    return Part("t", memory, tuple(whole.shape), tuple(boxes))


def _cut(data: st.DataObject, box: Box, depth: int = 3) -> list[Box]:
    """A box in pieces, cut along any dims at any places."""
    dims = [dim for dim, size in enumerate(box.shape) if size > 1]
    if depth == 0 or not dims or not data.draw(st.booleans()):
        return [box]
    dim = data.draw(st.sampled_from(dims))
    place = data.draw(st.integers(1, box.shape[dim] - 1))
    halves = []
    for first, size in ((0, place), (place, box.shape[dim] - place)):
        offsets, shape = list(box.offsets), list(box.shape)
        offsets[dim], shape[dim] = offsets[dim] + first, size
        halves += _cut(data, Box(tuple(offsets), tuple(shape)), depth - 1)
    return halves


@given(_SHAPES, st.data())
def test_boxes_of_a_run_hold_each_of_its_elements_once(shape: tuple[int, ...], data: st.DataObject) -> None:
    size = math.prod(shape)
    start = data.draw(st.integers(0, size))
    stop = data.draw(st.integers(start, size))
    whole = torch.arange(size).view(shape)
    part = part_of_run("t", torch.arange(start, stop), shape, start)
    assert len(part.boxes) <= max(1, 2 * len(shape) - 1)
    assert sum(piece.numel() for _, piece in part.pieces()) == stop - start
    assert all(torch.equal(whole[box.slices], piece) for box, piece in part.pieces())
    # What has no elements is not written.
    assert part.is_written_here == (stop > start)


@given(_SHAPES, st.data())
def test_a_whole_in_boxes_covers_and_hashes_as_the_whole(shape: tuple[int, ...], data: st.DataObject) -> None:
    whole = _values(shape)
    boxes = data.draw(st.permutations(_cut(data, whole_box(shape))))
    # Some boxes to one rank, some to the other.
    border = data.draw(st.integers(0, len(boxes)))
    parts = [_part_of_boxes(whole, boxes[:border]), _part_of_boxes(whole, boxes[border:])]
    rebuilt, times = torch.zeros_like(whole), torch.zeros_like(whole)
    for box, piece in (pair for part in parts for pair in part.pieces()):
        rebuilt[box.slices] = piece
        times[box.slices] += 1
    assert torch.equal(rebuilt, whole)
    assert bool((times == 1).all())
    hashed = sum(layout_independent_hash([part]) for part in parts)
    assert (hashed - layout_independent_hash([whole_part("t", whole)])) % (1 << 64) == 0


def test_a_hash_tells_places_and_chunks_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = _values((6, 7))
    columns = [Box((0, 0), (6, 3)), Box((0, 3), (6, 4))]
    expected = layout_independent_hash([whole_part("t", whole)])
    swapped = Part("t", _part_of_boxes(whole, columns).tensor, (6, 7), (Box((0, 4), (6, 3)), Box((0, 0), (6, 4))))
    assert layout_independent_hash([swapped]) != expected
    # In chunks that end inside of rows.
    monkeypatch.setattr("sharding.state._HASH_CHUNK", 5)
    assert layout_independent_hash([_part_of_boxes(whole, columns)]) == expected
    assert layout_independent_hash([whole_part("t", whole)]) == expected


def test_writing_to_a_piece_changes_the_memory() -> None:
    memory = torch.zeros(10)
    part = part_of_run("t", memory, (4, 5), 3)
    for index, (_, piece) in enumerate(part.pieces()):
        piece.fill_(index + 1)
    assert memory.tolist() == [1.0] * 2 + [2.0] * 5 + [3.0] * 3
    # A tensor that is one box need not lie in one piece of memory.
    matrix = torch.zeros(4, 5)
    ((_, piece),) = part_of("t", matrix.T).pieces()
    piece[0] = 1
    assert matrix[:, 0].tolist() == [1.0] * 4


def test_one_of_the_holders_writes() -> None:
    tensor = torch.zeros(2)
    for index in range(5):
        written = [part_of("t", tensor, Role(rank, 3), index).is_written_here for rank in range(3)]
        assert written == [rank == index % 3 for rank in range(3)]


def test_rows_are_known_where_they_are_whole() -> None:
    def rows_of(*boxes: Box) -> range | None:
        return _part_of_boxes(torch.zeros(4, 5), list(boxes)).rows

    assert rows_of(Box((1, 0), (2, 5))) == range(1, 3)
    assert rows_of() == range(0)
    assert rows_of(Box((1, 0), (2, 4))) is None
    assert rows_of(Box((0, 0), (1, 5)), Box((2, 0), (1, 5))) is None
    assert whole_part("t", torch.zeros(())).rows is None
    # A run that fills rows has them.
    assert part_of_run("t", torch.zeros(10), (4, 5), 5).rows == range(1, 3)


def test_optimizer_state_lies_beside_its_parameter() -> None:
    rows = Part("p", torch.zeros(2, 5), (4, 5), (Box((1, 0), (2, 5)),), Role(1, 2), writer=3)
    moment = rows.beside("m", torch.ones(2, 5))
    assert (moment.name, moment.boxes, moment.holders, moment.writer) == ("m", rows.boxes, Role(1, 2), 3)
    per_row = rows.beside("v", torch.ones(2, 1))
    assert (per_row.global_shape, per_row.boxes) == ((4, 1), (Box((1, 0), (2, 1)),))
    nothing = replace(rows, tensor=torch.zeros(0, 5), boxes=())
    assert nothing.beside("v", torch.ones(0, 1)).boxes == ()
    assert nothing.beside("v", torch.ones(0, 1)).global_shape == (4, 1)
    columns = Part("p", torch.zeros(4, 2), (4, 5), (Box((0, 1), (4, 2)),))
    assert columns.beside("m", torch.ones(4, 2)).boxes == columns.boxes
    with pytest.raises(ValueError, match=r"v of shape \[4, 1\] does not lie as p does"):
        columns.beside("v", torch.ones(4, 1))


def test_ranks_with_one_layout_are_those_that_hold_the_same() -> None:
    left = Part("t", torch.zeros(2, 2), (2, 4), (Box((0, 0), (2, 2)),))
    right = replace(left, boxes=(Box((0, 2), (2, 2)),))
    assert layout_hash([left]) == layout_hash([replace(left, tensor=torch.ones(2, 2), holders=Role(1, 2))])
    assert layout_hash([left]) != layout_hash([right])
    assert layout_hash([left]) != layout_hash([replace(left, name="u")])


_WIDE, _VECTOR, _HEAD = (6, 5), (7,), (3, 4)


def _parts_of_rank(rank: int, dims: ParallelDims, group: dist.ProcessGroup | None) -> list[tuple[Part, torch.Tensor]]:
    """Gradients as a rank of pipeline 2 x shard x tensor has them, beside the parts that they are of.

    A matrix whose columns tensor ranks divide and whose rows shards do, a vector that tensor ranks have alike, both in
    the first stage; in the last a matrix that every rank there has.
    """
    wide, vector, head = _values(_WIDE), _values(_VECTOR) * 2, _values(_HEAD) * 3
    shard, tensor = dims.sharding(rank), dims.coordinate(rank, "tensor")
    if dims.coordinate(rank, "pipeline"):
        return [(replace(part_of("head", head, dims.holder(rank, ("pipeline",))), sums_over=None), head)]
    rows = 6 // shard.degree
    columns = (Box((shard.rank * rows, 0), (rows, 2)), Box((shard.rank * rows, 2), (rows, 3)))[tensor]
    run = vector[shard.rank * 4 : shard.rank * 4 + 4] if shard.degree == 2 else vector
    holders = dims.holder(rank, ("pipeline", "shard"))
    boxes = tuple(boxes_of_run(_VECTOR, shard.rank * 4, shard.rank * 4 + len(run)))
    pieces = [
        Part("wide", wide[columns.slices], _WIDE, (columns,), dims.holder(rank, ("pipeline", "shard", "tensor"))),
        Part("vector", run, _VECTOR, boxes, holders),
    ]
    return [(replace(part, sums_over=group), part.tensor) for part in pieces]


def _plain_square() -> float:
    squares = [
        _values(_WIDE).square().sum(),
        (2 * _values(_VECTOR)).square().sum(),
        (3 * _values(_HEAD)).square().sum(),
    ]
    return float(sum(square.double() for square in squares))


def test_squares_over_holders_add_up_to_those_of_the_whole() -> None:
    for dims in (ParallelDims(pipeline=2, shard=2, tensor=2), ParallelDims(pipeline=2, tensor=2)):
        pieces = [pair for rank in range(dims.world_size) for pair in _parts_of_rank(rank, dims, None)]
        total = sum(float(gradient.double().square().sum()) / part.holders.degree for part, gradient in pieces)
        assert total == pytest.approx(_plain_square(), rel=1e-6)


def _norms(ranks: Ranks) -> None:
    # Stages, and matrices that are divided in them: one sum over all ranks.
    dims = ParallelDims(pipeline=2, tensor=2)
    pieces = _parts_of_rank(ranks.rank, dims, None)
    found = square_sum(pieces, [part for part, _ in pieces], dims, ranks.device)
    assert float(found) == pytest.approx(_plain_square(), rel=1e-6)
    # Rows over two shards, in two replicas: a sum over the shards.
    mesh = build_mesh(ParallelConfig(strategy="hsdp", replicate=2), ranks)
    wide, shard = _values(_WIDE), mesh.sharding
    rows = Box((3 * shard.rank, 0), (3, 5))
    part = Part("wide", wide[rows.slices], _WIDE, (rows,), mesh.shard_holder, sums_over=mesh.shard_group)
    found = square_sum([(part, part.tensor)], [part], mesh.dims, ranks.device)
    assert float(found) == pytest.approx(float(wide.double().square().sum()), rel=1e-6)
    # A rank without a gradient takes part in the sum.
    has_any = shard.rank == 0
    found = square_sum([(part, part.tensor)] if has_any else [], [part], mesh.dims, ranks.device)
    assert float(found) == pytest.approx(float(wide[:3].double().square().sum()), rel=1e-6)


def test_norms_on_ranks_that_hold_parts_are_the_plain_norm() -> None:
    run_on_ranks(_norms, 4)
