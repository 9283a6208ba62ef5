"""The bucketed engine: how parameters lie in buckets, what travels when, and that its state is everybody's."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.profiler import ProfilerActivity, profile

from sharding import flat_collectives
from sharding.bucketed import gradient_buckets
from sharding.bucketed.engine import BucketedEngine
from sharding.bucketed.flat_buckets import flatten_parameters
from sharding.engine import Engine
from sharding.memory_formula import BUCKET_ELEMENTS
from sharding.parallel_dims import Role
from sharding.ranks.process_group import Ranks
from sharding.state import MODEL_PREFIX
from tests.saved_state import save_state
from tests.sharding.engine_cases import num_targets, random_batch, tiny_engine, train_steps
from tests.support import TINY_MODEL, run_on_ranks
from trainer.checkpoint.reader import CheckpointReader

_STAGES = ("zero1", "zero2", "zero3")
_GROUPS = [{"pattern": "*.0.mlp.*", "lr_scale": 0.5, "weight_decay": 0.0}]


@settings(max_examples=50)
@given(
    st.lists(st.lists(st.integers(1, 9), max_size=3), min_size=1, max_size=8),
    st.integers(1, 5),
    st.integers(1, 400),
)
def test_ranks_divide_every_parameter_between_them(shapes: list[list[int]], num_ranks: int, limit: int) -> None:
    values = [torch.randn(shape) for shape in shapes]
    seen = [torch.zeros(value.numel(), dtype=torch.int) for value in values]
    for rank in range(num_ranks):
        parameters = [(str(index), nn.Parameter(value.clone())) for index, value in enumerate(values)]
        buckets = flatten_parameters(parameters, Role(rank, num_ranks), limit + 16 * num_ranks)
        assert [int(member.name) for bucket in buckets for member in bucket.members] == [*reversed(range(len(shapes)))]
        for bucket in buckets:
            assert bucket.flat.numel() == bucket.length * num_ranks
            assert len(bucket.members) == 1 or bucket.flat.numel() <= limit + 16 * num_ranks
            for member in bucket.members:
                index = int(member.name)
                assert member.parameter.data_ptr() % 64 == 0
                assert torch.equal(member.parameter, values[index])
                offset, size, start = bucket.run(member)
                run = bucket.masters[offset : offset + size]
                assert torch.equal(run, values[index].flatten()[start : start + size])
                seen[index][start : start + size] += 1
    assert all(bool((count == 1).all()) for count in seen)


def _engine(ranks: Ranks, strategy: str, **options: Any) -> Engine:
    options = {"optimizer": {"lr": 1e-2, "groups": _GROUPS}} | options
    return tiny_engine(ranks, strategy, **options)


def _bucketed(ranks: Ranks, strategy: str, **options: Any) -> BucketedEngine:
    # The tiny model would lie in one bucket.
    BUCKET_ELEMENTS["cpu"] = 4096
    engine = _engine(ranks, strategy, backend="bucketed", **options)
    assert isinstance(engine, BucketedEngine)
    return engine


def _load(engine: Engine, folder: Path) -> Engine:
    engine.load_state(CheckpointReader(folder).read_into, with_optimizer=True)
    return engine


def _collectives(ranks: Ranks, engine: Engine) -> Counter[str]:
    batches = [random_batch(index) for index in range(3)]
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        engine.train_batch(batches, num_targets(batches, ranks.world_size))
        engine.clip_grad_norm(1.0)
        engine.step(0.0)
        engine.settle()
    counts = {e.key.removeprefix("c10d::"): e.count for e in recorded.key_averages() if e.key.startswith("c10d::")}
    return Counter(counts)


def _train_and_save(ranks: Ranks, root: Path) -> None:
    reference = _engine(ranks, "ddp")
    losses = train_steps(reference, ranks)
    save_state(reference, root / "ddp", ranks)
    later = train_steps(reference, ranks)
    for strategy in _STAGES:
        engine = _bucketed(ranks, strategy)
        # The embedding alone has one.
        assert len(engine._gradients._buckets) > 3
        assert train_steps(engine, ranks) == pytest.approx(losses, rel=1e-6), strategy
        save_state(engine, root / strategy, ranks)
        # As everybody's state: of the same layout, and of others.
        exact = train_steps(engine, ranks)
        assert exact == pytest.approx(later, rel=1e-5), strategy
        assert train_steps(_load(_bucketed(ranks, strategy), root / strategy), ranks) == exact, strategy
        other = _load(_bucketed(ranks, strategy), root / "ddp")
        assert train_steps(other, ranks) == pytest.approx(later, rel=1e-5), strategy
        own = sum(shard.numel() for shard in engine.named_local_shards().values())
        size = sum(parameter.numel() for _, parameter in engine.named_parameters())
        assert own < 1.2 * size / ranks.world_size
        _check_memory(ranks, engine, strategy)
        _check_collectives(ranks, engine, strategy)
        _check_norms(ranks, strategy)
        if strategy != "zero3":
            _check_unused(ranks, strategy)
    for compute in ("bf16", "fp16"):
        _check_16_bits(ranks, compute)
    _check_waits(ranks, "zero1")
    _check_recomputed(ranks, losses, activation_checkpointing={"mode": "full"})
    backends = (("torch", "zero3"), ("deepspeed", "zero2"))
    for backend, strategy in backends:
        other = _load(_engine(ranks, strategy, backend=backend), root / "zero2")
        assert train_steps(other, ranks) == pytest.approx(later, rel=1e-5), backend
    save_state(other, root / "deepspeed", ranks)
    after = train_steps(other, ranks)
    back = _load(_bucketed(ranks, "zero1"), root / "deepspeed")
    assert train_steps(back, ranks) == pytest.approx(after, rel=1e-5)
    if ranks.rank == 0:
        torch.save(later, root / "later")


def _check_memory(ranks: Ranks, engine: BucketedEngine, strategy: str) -> None:
    """Stages 1 and 2 have all parameters on every rank, and the same; stage 3 what the next pass begins with."""
    if strategy == "zero3":
        blocks = [f"model.layers.{index}." for index in range(TINY_MODEL["config"]["num_hidden_layers"])]
        assert len(blocks) > 1
        engine.evaluate([random_batch(0)])
        for bucket in engine._gradients._buckets:
            assert len({name for m in bucket.members for name in blocks if m.name.startswith(name)}) <= 1
            is_later = any(member.name.startswith(name) for member in bucket.members for name in blocks[1:])
            assert bucket.is_whole != is_later
        assert engine.replicas() == []
        return
    whole = torch.cat([parameter.detach().flatten() for _, parameter in engine.named_parameters()])
    everyone = [torch.empty_like(whole) for _ in range(ranks.world_size)]
    torch.distributed.all_gather(everyone, whole)
    assert all(torch.equal(whole, found) for found in everyone)


def _check_collectives(ranks: Ranks, engine: BucketedEngine, strategy: str) -> None:
    num_buckets = len(engine._gradients._buckets)
    found = _collectives(ranks, engine)
    assert found["alltoall_base_"] == num_buckets * (1 if strategy == "zero1" else 3), (strategy, found)
    assert found["broadcast_"] == _num_gathers(engine, strategy) * ranks.world_size, (strategy, found)
    # The norm, with which parameters were reached.
    assert found["allreduce_"] == 1, (strategy, found)


def _num_gathers(engine: BucketedEngine, strategy: str) -> int:
    """Of buckets in a step of three micro-batches."""
    if strategy != "zero3":
        return len(engine._gradients._buckets)
    gathers = engine._gathers
    _, *middle, last = (len(block._buckets) for block in gathers._blocks)
    # The last block once, since the backward pass begins with it, and each but the first forwards and backwards.
    return len(gathers._staying) + 3 * (last + 2 * sum(middle))


def _check_16_bits(ranks: Ranks, compute: str) -> None:
    """Every rank computes with the same rounded masters, and only fp32 adds up what they find."""
    options: dict[str, Any] = {"precision": {"compute": compute}, "optimizer": {"name": "sgd", "lr": 0.1}}
    reference = _engine(ranks, "zero2", **options)
    losses = train_steps(reference, ranks)
    whole = {name: parameter.full_tensor() for name, parameter in reference.named_parameters()}
    for strategy in _STAGES:
        engine = _bucketed(ranks, strategy, **options)
        found = train_steps(engine, ranks)
        assert found == pytest.approx(losses, rel=1e-5), (compute, strategy)
        assert {parameter.dtype.itemsize for _, parameter in engine.named_parameters()} == {2}
        for part in engine.state(with_optimizer=False):
            name = part.name.removeprefix(MODEL_PREFIX)
            if name in whole:
                assert part.tensor.dtype is torch.float32
                for box, piece in part.pieces():
                    torch.testing.assert_close(piece, whole[name][box.slices], rtol=0, atol=1e-8)


def _check_recomputed(ranks: Ranks, losses: list[float], **options: Any) -> None:
    """Hooks of stage 3 see one forward and one backward pass of a block, however it is carried out."""
    engine = _bucketed(ranks, "zero3", **options)
    assert train_steps(engine, ranks) == pytest.approx(losses, rel=1e-5), options
    _check_collectives(ranks, engine, "zero3")


def _check_norms(ranks: Ranks, strategy: str) -> None:
    """Norms of the whole gradient and of single micro-batches are those of ddp."""
    batches = [random_batch(index) for index in range(2)]
    found = []
    for engine in (_engine(ranks, "ddp"), _bucketed(ranks, strategy)):
        _, squares = engine.train_batch_with_norms(batches, num_targets(batches, ranks.world_size))
        found.append([float(engine.clip_grad_norm(0.1)), *squares.tolist()])
        # After clipping.
        found[-1].append(float(engine.clip_grad_norm(0.0)))
    assert found[1] == pytest.approx(found[0], rel=1e-5), strategy
    assert found[1][-1] == pytest.approx(0.1, rel=1e-4)


def _check_unused(ranks: Ranks, strategy: str) -> None:
    """A block that only some ranks use, and only in some passes, does not put collectives out of order."""
    engine = _bucketed(ranks, strategy)
    model, block = engine._model, engine._model.model.layers[1]
    forward, num_calls = block.forward, 0

    def sometimes(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal num_calls
        num_calls += 1
        return hidden if (num_calls + ranks.rank) % 2 else forward(hidden, *args, **kwargs)

    block.forward = sometimes
    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    batches = [random_batch(index) for index in range(3)]
    for _ in range(2):
        engine.train_batch(batches, num_targets(batches, ranks.world_size))
        engine.drop_gradients()
    num_calls = 0
    engine.train_batch(batches, 1)
    norm = float(engine.clip_grad_norm(0.0))
    engine.drop_gradients()
    num_calls = 0
    for batch in batches:
        loss = engine._loss(model, batch)
        names, parameters = zip(*model.named_parameters(), strict=True)
        for name, gradient in zip(names, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True):
            if gradient is not None:
                expected[name] += gradient
    flat = torch.cat([gradient.flatten() for gradient in expected.values()])
    torch.distributed.all_reduce(flat)
    assert norm == pytest.approx(float(flat.double().norm()), rel=1e-5), strategy


_BART = {
    "architecture": "bart",
    "config": {"d_model": 30, "decoder_layers": 2, "decoder_attention_heads": 3, "decoder_ffn_dim": 53, "dropout": 0.0},
}


def _check_waits(ranks: Ranks, strategy: str) -> None:
    """BART registers a norm after its blocks and runs it before them."""
    options: dict[str, Any] = {"model": _BART, "optimizer": {"lr": 1e-2}}
    engine = _bucketed(ranks, strategy, **options)
    pending: list[str] = []

    def look(module: nn.Module, _arguments: object) -> None:
        own = {id(parameter) for parameter in module.parameters(recurse=False)}
        for index, bucket in enumerate(engine._gathers._staying):
            if own & {id(m.parameter) for m in bucket.members} and index in engine._gathers._works:
                pending.append(type(module).__name__)

    for module in engine._model.modules():
        module.register_forward_pre_hook(look)
    assert train_steps(engine, ranks, num_steps=2) == pytest.approx(
        train_steps(_engine(ranks, "ddp", **options), ranks, num_steps=2), rel=1e-6
    )
    assert not pending, pending


def _as_on_gpus(ranks: Ranks) -> None:
    """The collectives of NCCL, which gloo has too."""
    expected = train_steps(_engine(ranks, "ddp"), ranks, num_micro_batches=3)
    gradient_buckets.exchanges_slices = flat_collectives.exchanges_slices = lambda _group: False  # type: ignore[attr-defined, assignment]
    for strategy in _STAGES:
        engine = _bucketed(ranks, strategy)
        assert train_steps(engine, ranks, num_micro_batches=3) == pytest.approx(expected, rel=1e-6), strategy
        found = _collectives(ranks, engine)
        num_buckets = len(engine._gradients._buckets)
        assert found["_reduce_scatter_base_"] == num_buckets * (1 if strategy == "zero1" else 3), (strategy, found)
        assert found["_allgather_base_"] == _num_gathers(engine, strategy), (strategy, found)
        assert found["alltoall_base_"] == found["broadcast_"] == 0


def _train_elsewhere(ranks: Ranks, root: Path) -> None:
    # Every rank has the same micro-batches, so the steps are those of two ranks.
    later = torch.load(root / "later")
    for strategy in _STAGES:
        for saved_by in ("ddp", *_STAGES, "deepspeed"):
            engine = _load(_bucketed(ranks, strategy), root / saved_by)
            if saved_by != "deepspeed":
                assert train_steps(engine, ranks) == pytest.approx(later, rel=1e-5), (strategy, saved_by)
    _as_on_gpus(ranks)


@pytest.mark.timeout(300)
def test_it_trains_as_the_others_do_and_its_state_is_theirs(tmp_path: Path) -> None:
    run_on_ranks(_train_and_save, 2, tmp_path, timeout_s=240)
    run_on_ranks(_train_elsewhere, 3, tmp_path, timeout_s=240)


def _train_compiled(ranks: Ranks) -> None:
    losses = train_steps(_engine(ranks, "ddp"), ranks)
    _check_recomputed(ranks, losses, activation_checkpointing={"mode": "selective"}, compile={"enabled": True})


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_compiled_blocks_are_gathered_as_others_are() -> None:
    run_on_ranks(_train_compiled, 2, timeout_s=240)
