"""Engines on two ranks: what travels, what is skipped, what precision means."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from sharding.engine import Engine
from sharding.ranks.process_group import Ranks
from tests.sharding.engine_cases import (
    STRATEGIES,
    num_targets,
    random_batch,
    tiny_engine,
    train_steps,
)
from tests.support import run_on_ranks

# The tiny model has three blocks and the group of everything else.
_NUM_GROUPS = 4
_NUM_MICRO_BATCHES = 3


def _count_collectives(ranks: Ranks) -> None:
    counts = {}
    for strategy in STRATEGIES:
        engine = tiny_engine(ranks, strategy)
        # In their first passes ranks compare what they run.
        train_steps(engine, ranks, num_steps=4)
        batches = [random_batch(index) for index in range(_NUM_MICRO_BATCHES)]
        with profile(activities=[ProfilerActivity.CPU]) as recorded:
            engine.train_batch(batches, num_targets(batches, ranks.world_size))
        counts[strategy] = {event.key.removeprefix("c10d::"): event.count for event in recorded.key_averages()}
    all_reduces = {name: count.get("allreduce_", 0) for name, count in counts.items()}
    # On gloo each rank's slice is broadcast, and sums are taken of what ranks send one another.
    gathers = {name: count.get("broadcast_", 0) / ranks.world_size for name, count in counts.items()}
    scatters = {name: count.get("alltoall_base_", 0) for name, count in counts.items()}
    # Stage 1 reduces once a step, stages 2 and 3 once a micro-batch.
    assert scatters == {
        "ddp": 0,
        "zero1": _NUM_GROUPS,
        "zero2": _NUM_GROUPS * _NUM_MICRO_BATCHES,
        "zero3": _NUM_GROUPS * _NUM_MICRO_BATCHES,
    }, counts
    # Stages 1 and 2 gather each group once a step; stage 3 gathers blocks for each forward and again for each backward,
    # but the last once for both, and what is in no block once a step.
    # One bucket holds the whole tiny model. What a rank reached is told with it, and elsewhere with the norm.
    assert all_reduces == {"ddp": 1, "zero1": 0, "zero2": 0, "zero3": 0}
    assert gathers["ddp"] == 0
    assert gathers["zero1"] == gathers["zero2"] == _NUM_GROUPS
    assert gathers["zero3"] == 1 + (2 * 2 + 1) * _NUM_MICRO_BATCHES


def test_accumulation_communicates_no_more_than_the_stage_demands() -> None:
    run_on_ranks(_count_collectives, 2)


def _skip_together(ranks: Ranks) -> None:
    for strategy in STRATEGIES:
        engine = tiny_engine(ranks, strategy)
        train_steps(engine, ranks, num_steps=2)
        before = {name: shard.clone() for name, shard in engine.named_local_shards().items()}
        moments = {part.name: part.tensor.clone() for part in engine.state(with_optimizer=True)}
        batches = [random_batch(5), random_batch(6)]
        engine._loss, loss = _poisoned(engine._loss, on_this_rank=ranks.rank == 1), engine._loss  # type: ignore[attr-defined]
        engine.train_batch(batches, num_targets(batches, ranks.world_size))
        engine._loss = loss  # type: ignore[attr-defined]
        norm = engine.clip_grad_norm(1.0)
        stepped = engine.step(1e-2)
        assert not norm.isfinite(), strategy
        assert stepped == 0.0, strategy
        for name, shard in engine.named_local_shards().items():
            assert torch.equal(shard, before[name]), (strategy, name)
        for part in engine.state(with_optimizer=True):
            assert torch.equal(part.tensor, moments[part.name]), (strategy, part.name)
        losses = train_steps(engine, ranks, num_steps=1)
        assert all(loss < float("inf") for loss in losses), strategy
        assert any(
            not torch.equal(shard, before[name]) for name, shard in engine.named_local_shards().items() if shard.numel()
        ), strategy


def _poisoned(loss, on_this_rank: bool):  # type: ignore[no-untyped-def]
    """A loss that is infinite but has finite gradients, on one rank alone."""

    def poisoned(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        value = loss(model, batch)
        return value + float("inf") if on_this_rank else value

    return poisoned


def test_all_ranks_skip_a_step_that_is_infinite_on_one() -> None:
    run_on_ranks(_skip_together, 2)


def _bf16(ranks: Ranks) -> None:
    reference = train_steps(tiny_engine(ranks, "ddp", precision={"compute": "fp32"}), ranks)
    for strategy in STRATEGIES:
        engine = tiny_engine(ranks, strategy, precision={"compute": "bf16"})
        losses = train_steps(engine, ranks)
        assert losses == pytest.approx(reference, rel=2e-2), strategy
        assert losses != reference, strategy
        for part in engine.state(with_optimizer=True):
            assert part.tensor.dtype is torch.float32, part.name
        if strategy != "ddp":
            assert _reduction_dtypes(engine) == {torch.float32}, strategy


class _ReductionDtypes(TorchDispatchMode):
    """Collects the element types of what ranks send one another to be summed."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[torch.dtype] = set()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if "alltoall_base_" in str(operator):
            self.seen |= {argument.dtype for argument in args if isinstance(argument, torch.Tensor)}
        return operator(*args, **(kwargs or {}))


def _reduction_dtypes(engine: Engine) -> set[torch.dtype]:
    with _ReductionDtypes() as mode:
        engine.train_batch([random_batch(0)], 1)
    return mode.seen


def test_bf16_keeps_masters_moments_and_reduction_in_fp32() -> None:
    run_on_ranks(_bf16, 2)


_CHECKPOINTING = ({"mode": "full"}, {"mode": "every_n", "every_n": 2}, {"mode": "selective"})


def _recomputation(ranks: Ranks) -> None:
    for strategy in ("none", "ddp", "zero2", "zero3") if ranks.world_size == 1 else ("ddp", "zero3"):
        reference = train_steps(tiny_engine(ranks, strategy), ranks)
        for settings in _CHECKPOINTING:
            losses = train_steps(tiny_engine(ranks, strategy, activation_checkpointing=settings), ranks)
            assert losses == pytest.approx(reference, rel=1e-6), (strategy, settings)


def test_activation_checkpointing_changes_no_result() -> None:
    run_on_ranks(_recomputation, 2)


def _saved_bytes(ranks: Ranks) -> None:
    saved = {}
    for settings in ({"mode": "none"}, *_CHECKPOINTING):
        engine = tiny_engine(ranks, "none", activation_checkpointing=settings)
        sizes: dict[int, int] = {}

        def keep(tensor: torch.Tensor, sizes: dict[int, int] = sizes) -> torch.Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model, loss = engine._model, engine._loss  # type: ignore[attr-defined]
            loss(model, random_batch(0))
        saved[settings["mode"]] = sum(sizes.values())
    assert saved["full"] < saved["every_n"] < saved["none"], saved
    assert saved["full"] < saved["none"] / 2, saved


def test_activation_checkpointing_saves_memory() -> None:
    run_on_ranks(_saved_bytes, 1)


def _compiled(ranks: Ranks) -> None:
    for backend, strategy, mode in (
        ("torch", "ddp", "full"),
        ("torch", "zero2", "budget"),
        ("bucketed", "zero2", "full"),
    ):
        sections = {"compile": {"enabled": True}, "activation_checkpointing": {"mode": mode}}
        reference = train_steps(tiny_engine(ranks, strategy, backend=backend), ranks, num_steps=2)
        engine = tiny_engine(ranks, strategy, backend=backend, **sections)
        assert train_steps(engine, ranks, num_steps=2) == pytest.approx(reference, rel=1e-5), strategy
        names = [name for name, _ in engine.named_parameters()]
        assert not any("_orig_mod" in name or "_checkpoint_wrapped" in name for name in names)


@pytest.mark.timeout(400)
def test_compiled_blocks_train_the_same_and_keep_their_names() -> None:
    run_on_ranks(_compiled, 2, timeout_s=380)
