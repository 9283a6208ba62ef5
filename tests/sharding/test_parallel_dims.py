"""Axes of ranks and the roles that follow: every rank once, and by hand for eight ranks."""

from collections import Counter

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from sharding.config import ParallelConfig
from sharding.engine import ModelDefinition
from sharding.mesh import ParallelMesh, build_mesh
from sharding.parallel_dims import ALONE, AXES, ParallelDims, Role, parallel_dims
from sharding.ranks.errors import UserError
from sharding.ranks.process_group import Ranks
from sharding.torch_engine import TorchEngine
from tests.support import run_on_ranks

_EIGHT = ParallelDims(pipeline=2, shard=2, tensor=2)

_ANY = st.builds(ParallelDims, **{axis: st.integers(1, 3 if axis == "shard" else 2) for axis in AXES})
_SOME_AXES = st.sets(st.sampled_from(AXES))


def test_neighbours_share_a_tensor_and_the_halves_are_stages() -> None:
    assert [_EIGHT.coordinate(rank, "tensor") for rank in range(8)] == [0, 1, 0, 1, 0, 1, 0, 1]
    assert [_EIGHT.coordinate(rank, "shard") for rank in range(8)] == [0, 0, 1, 1, 0, 0, 1, 1]
    assert [_EIGHT.coordinate(rank, "pipeline") for rank in range(8)] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert [_EIGHT.coordinate(rank, "context") for rank in range(8)] == [0] * 8


def test_roles_of_eight_ranks() -> None:
    # Stages and tensor ranks read what their peers read.
    assert [_EIGHT.data(rank).rank for rank in range(8)] == [0, 0, 1, 1, 0, 0, 1, 1]
    assert _EIGHT.data_degree == 2
    assert [_EIGHT.sharding(rank) for rank in range(8)] == [_EIGHT.data(rank) for rank in range(8)]
    assert _EIGHT.first_readers() == [0, 2]
    # The last stage has the loss, its tensor ranks all the same one.
    assert [rank for rank in range(8) if _EIGHT.counts_loss(rank)] == [4, 6]
    assert [rank for rank in range(8) if _EIGHT.counts_targets(rank)] == [4, 6]
    # Of a whole number there are eight copies, of a vector that tensor ranks share four a stage, of a shard one.
    assert [rank for rank in range(8) if _EIGHT.holder(rank).takes()] == [0]
    assert [_EIGHT.holder(rank, ("pipeline",)).rank for rank in range(8)] == [0, 1, 2, 3, 0, 1, 2, 3]
    assert {_EIGHT.holder(rank, ("pipeline", "shard", "tensor")) for rank in range(8)} == {ALONE}
    assert _EIGHT.peers(5, ("shard",)) == [5, 7]


def test_roles_under_context_and_replicas() -> None:
    dims = ParallelDims(replicate=2, shard=2, context=2)
    assert [dims.data(rank).rank for rank in range(8)] == [0, 0, 1, 1, 2, 2, 3, 3]
    # What shards the state are both ranks of a sequence.
    assert [dims.sharding(rank) for rank in range(4)] == [Role(index, 4) for index in range(4)]
    assert dims.reduction_degree == 8
    assert [dims.holder(rank, ("shard", "context")) for rank in (0, 3, 4, 7)] == [Role(0, 2)] * 2 + [Role(1, 2)] * 2
    # Each counts the loss of its part of a sequence, one of them the targets.
    assert all(dims.counts_loss(rank) for rank in range(8))
    assert [rank for rank in range(8) if dims.counts_targets(rank)] == [0, 2, 4, 6]


@settings(max_examples=40)
@given(_ANY, _SOME_AXES)
def test_every_rank_has_one_place_in_each_group(dims: ParallelDims, axes: set[str]) -> None:
    every = range(dims.world_size)
    assert len({tuple(dims.coordinate(rank, axis) for axis in AXES) for rank in every}) == dims.world_size
    for rank in every:
        peers = dims.peers(rank, axes)  # type: ignore[arg-type]
        places = [dims.role(peer, axes) for peer in peers]  # type: ignore[arg-type]
        assert rank in peers
        assert peers == sorted(peers)
        assert places == [Role(index, len(peers)) for index in range(len(peers))]


@settings(max_examples=40)
@given(_ANY)
def test_data_loss_and_targets_are_counted_once(dims: ParallelDims) -> None:
    every = range(dims.world_size)
    readers = Counter(dims.data(rank).rank for rank in every if dims.counts_targets(rank))
    assert readers == Counter(range(dims.data_degree))
    losses = Counter((dims.data(r).rank, dims.coordinate(r, "context")) for r in every if dims.counts_loss(r))
    assert set(losses.values()) == {1}
    assert len(losses) == dims.data_degree * dims.context
    assert [dims.data(rank).rank for rank in dims.first_readers()] == list(range(dims.data_degree))


@settings(max_examples=40)
@given(_ANY, _SOME_AXES, st.integers(0, 50))
def test_of_the_holders_of_a_piece_one_writes_it(dims: ParallelDims, axes: set[str], index: int) -> None:
    writers = Counter(
        tuple(dims.coordinate(rank, axis) for axis in AXES if axis in axes)
        for rank in range(dims.world_size)
        if dims.holder(rank, axes).takes(index)  # type: ignore[arg-type]
    )
    # One for each piece.
    assert len(writers) == dims.degree(axes)  # type: ignore[arg-type]
    assert set(writers.values()) == {1}


def test_what_other_axes_leave_is_shard() -> None:
    assert parallel_dims(ParallelConfig(strategy="zero2"), 6) == ParallelDims(shard=6)
    assert parallel_dims(ParallelConfig(strategy="hsdp", replicate=2), 6) == ParallelDims(replicate=2, shard=3)
    assert parallel_dims(ParallelConfig(tensor=2, pipeline=2), 8) == _EIGHT
    with pytest.raises(UserError, match=r"pipeline=2 x parallel.tensor=2 = 4 does not divide 6 ranks; start 4"):
        parallel_dims(ParallelConfig(tensor=2, pipeline=2), 6)


def _check_groups(ranks: Ranks) -> None:
    mesh = build_mesh(ParallelConfig(tensor=2), ranks)
    assert mesh.device_mesh is not None
    assert mesh.device_mesh.mesh_dim_names == ("shard", "tensor")
    assert mesh.sharding_mesh is not None
    assert mesh.sharding_mesh.mesh_dim_names == ("shard",)
    _check_group(mesh, ranks)
    # Both ranks of a sequence are on the shard axis.
    mesh = build_mesh(ParallelConfig(strategy="hsdp", replicate=2, context=2), ranks)
    assert mesh.sharding_mesh is not None
    assert mesh.sharding_mesh.shape == (2, 2)
    assert mesh.reduction_group is None
    _check_group(mesh, ranks)
    mesh = build_mesh(ParallelConfig(strategy="hsdp", replicate=2, pipeline=2), ranks)
    _check_group(mesh, ranks)
    assert mesh.reduction_group is not None
    assert dist.get_process_group_ranks(mesh.reduction_group) == [ranks.rank // 2 * 2, ranks.rank // 2 * 2 + 1]
    mesh = build_mesh(ParallelConfig(strategy="hsdp", replicate=2), ranks)
    assert mesh.device_mesh is mesh.sharding_mesh


def _check_group(mesh: ParallelMesh, ranks: Ranks) -> None:
    assert mesh.shard_group is not None
    members = dist.get_process_group_ranks(mesh.shard_group)
    assert members == mesh.dims.peers(ranks.rank, ("shard", "context"))
    assert dist.get_rank(mesh.shard_group) == mesh.sharding.rank


def test_groups_of_the_mesh_are_those_of_the_roles() -> None:
    run_on_ranks(_check_groups, 4)


def test_an_engine_gives_no_loss_where_it_does_not_count() -> None:
    model = torch.nn.Linear(2, 1)
    definition = ModelDefinition(
        model, lambda _: None, lambda model, batch: model(batch["x"]).sum() + 1, lambda model, batch: torch.ones(3), 0
    )
    batch = {"x": torch.ones(1, 2)}
    for rank, dims, counts in ((0, ParallelDims(tensor=2), True), (1, ParallelDims(tensor=2), False)):
        mesh = ParallelMesh(dims, rank)
        engine = TorchEngine(
            definition, mesh, torch.device("cpu"), None, lambda parts: torch.optim.SGD([p.tensor for p in parts])
        )
        assert (float(engine.train_batch([batch], 1)) != 0) == counts
        assert [sums.tolist() for sums in engine.evaluate([batch])] == [[float(counts)] * 3]
        # Its gradients do.
        assert all(bool(gradient.any()) for gradient in engine.named_local_gradients().values())
