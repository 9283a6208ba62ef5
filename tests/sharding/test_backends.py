"""DeepSpeed, Accelerate and our buckets behind the Engine protocol, and fp16 under every engine, on two ranks."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from sharding import accelerate_engine
from sharding.engine import Batch, Engine
from sharding.part import Part
from sharding.ranks.errors import UserError
from sharding.ranks.process_group import Ranks
from tests.sharding.engine_cases import STRATEGIES, num_targets, random_batch, tiny_engine, train_steps
from tests.support import run_on_ranks

OTHER_BACKENDS = (
    ("deepspeed", "zero1"),
    ("deepspeed", "zero2"),
    ("deepspeed", "zero3"),
    ("accelerate", "ddp"),
    ("bucketed", "zero1"),
    ("bucketed", "zero2"),
    ("bucketed", "zero3"),
)
ALL = (*(("torch", strategy) for strategy in STRATEGIES), *OTHER_BACKENDS)


def _skip_together(ranks: Ranks) -> None:
    for backend, strategy in OTHER_BACKENDS:
        engine = tiny_engine(ranks, strategy, backend=backend)
        train_steps(engine, ranks, num_steps=2)
        before = {part.name: part.tensor.clone() for part in engine.state(with_optimizer=True)}
        _train_on_an_infinite_loss(engine, ranks)
        assert not engine.clip_grad_norm(1.0).isfinite(), (backend, strategy)
        assert engine.step(1e-2) == 0.0, (backend, strategy)
        for part in engine.state(with_optimizer=True):
            assert torch.equal(part.tensor, before[part.name]), (backend, strategy, part.name)
        losses = train_steps(engine, ranks, num_steps=1)
        assert all(math.isfinite(loss) for loss in losses), (backend, strategy)
        assert any(
            not torch.equal(part.tensor, before[part.name])
            for part in engine.state(with_optimizer=False)
            if part.tensor.numel()
        ), (backend, strategy)


def _announced(batches: list[Batch], events: list[str]) -> Iterator[Batch]:
    for batch in batches:
        events.append("asked for")
        yield batch


def _evaluate_in_order(ranks: Ranks) -> None:
    for backend, strategy in ALL:
        engine = tiny_engine(ranks, strategy, backend=backend)
        train_steps(engine, ranks, num_steps=1)
        batches = [random_batch(10 * ranks.rank + index) for index in range(3)]
        alone = [engine.evaluate([batch])[0] for batch in batches]
        assert not torch.equal(alone[0], alone[1])
        events: list[str] = []
        holder: Any = engine
        model = holder._definition.model if hasattr(engine, "_definition") else holder._model
        hook = model.register_forward_pre_hook(lambda *_, events=events: events.append("pass"))
        found = engine.evaluate(_announced(batches, events))
        hook.remove()
        # A generator that seeds each pass depends on it.
        assert events == ["asked for", "pass"] * 3, (backend, strategy)
        assert all(map(torch.equal, found, alone)), (backend, strategy)
        assert engine.evaluate([]) == [], (backend, strategy)
        # Training goes on from there.
        assert all(map(math.isfinite, train_steps(engine, ranks, num_steps=1))), (backend, strategy)
        if backend == "deepspeed":
            assert engine.named_local_gradients() == {}
            with pytest.raises(UserError, match="deepspeed does not show each micro-batch's own gradient"):
                engine.train_batch_with_norms(batches, 1)


def test_each_batch_is_asked_for_when_its_evaluation_begins() -> None:
    run_on_ranks(_evaluate_in_order, 2)


def _train_on_an_infinite_loss(engine: Engine, ranks: Ranks) -> None:
    """One rank's loss is infinite, with finite gradients."""
    holder = engine._definition if hasattr(engine, "_definition") else engine  # type: ignore[attr-defined]
    name = "loss" if hasattr(engine, "_definition") else "_loss"
    original = getattr(holder, name)

    def poisoned(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return original(model, batch) + (math.inf if ranks.rank == 1 else 0.0)

    # ModelDefinition is frozen.
    object.__setattr__(holder, name, poisoned)
    batches = [random_batch(5), random_batch(6)]
    engine.train_batch(batches, num_targets(batches, ranks.world_size))
    object.__setattr__(holder, name, original)


@pytest.mark.timeout(300)
def test_all_ranks_skip_a_step_that_is_infinite_on_one() -> None:
    run_on_ranks(_skip_together, 2, timeout_s=240)


def _sixteen_bits(ranks: Ranks) -> None:
    reference = train_steps(tiny_engine(ranks, "ddp", precision={"compute": "fp32"}), ranks)
    for dtype in ("bf16", "fp16"):
        for backend, strategy in ALL if dtype == "fp16" else OTHER_BACKENDS:
            engine = tiny_engine(ranks, strategy, backend=backend, precision={"compute": dtype})
            losses = train_steps(engine, ranks)
            assert losses == pytest.approx(reference, rel=2e-2), (dtype, backend, strategy)
            assert losses != reference, (dtype, backend, strategy)
            assert (engine.loss_scale is not None) == (dtype == "fp16")
            for part in engine.state(with_optimizer=True):
                if part.name != "scaler/good_steps":
                    assert part.tensor.dtype is torch.float32, (dtype, backend, strategy, part.name)


@pytest.mark.timeout(300)
def test_sixteen_bits_compute_and_thirty_two_remember() -> None:
    run_on_ranks(_sixteen_bits, 2, timeout_s=240)


def _loss_scale(ranks: Ranks) -> None:
    for backend, strategy in ALL:
        case = (backend, strategy)
        # 2^28 / targets overflows fp16 at once; the scale must fall until the gradients fit.
        precision = {"compute": "fp16", "initial_loss_scale": 2.0**28, "loss_scale_growth_steps": 2}
        engine = tiny_engine(ranks, strategy, backend=backend, precision=precision)
        batches = [random_batch(1), random_batch(2)]
        stepped = []
        scales = []
        # Until it has fallen, and had two good steps.
        while 1.0 not in stepped[:-2] and len(stepped) < 30:
            scales.append(float(engine.loss_scale))  # type: ignore[arg-type]
            engine.train_batch(batches, num_targets(batches, ranks.world_size))
            engine.clip_grad_norm(1.0)
            stepped.append(float(engine.step(1e-3)))
        assert stepped[0] == 0.0, case
        assert 1.0 in stepped, case
        first = stepped.index(1.0)
        assert stepped[:first] == [0.0] * first, case
        assert scales[: first + 1] == [2.0 ** (28 - index) for index in range(first + 1)], case
        # Two good steps, and it is tried with twice the scale.
        assert scales[first + 2] == 2 * scales[first], case
        # The scaler's state is canonical: another engine goes on with it.
        other = tiny_engine(ranks, strategy, backend=backend, precision={"compute": "fp16"})
        saved = {p.name: p.tensor.clone() for p in engine.state(with_optimizer=True)}

        def read(part: Part, saved: dict[Any, torch.Tensor] = saved) -> None:
            part.tensor.copy_(saved[part.name])

        other.load_state(read, with_optimizer=True)
        assert float(other.loss_scale) == float(engine.loss_scale), case  # type: ignore[arg-type]
        assert {p.name for p in other.state(with_optimizer=True)} >= {"scaler/scale", "scaler/good_steps"}


@pytest.mark.timeout(300)
def test_the_loss_scale_falls_and_rises_alike_on_all_ranks() -> None:
    run_on_ranks(_loss_scale, 2, timeout_s=240)


def _norm_does_not_know_the_scale(ranks: Ranks) -> None:
    norms = {}
    for backend, strategy in ALL:
        for scale in (1.0, 1024.0):
            precision = {"compute": "fp16", "initial_loss_scale": scale}
            engine = tiny_engine(ranks, strategy, backend=backend, precision=precision)
            batches = [random_batch(1), random_batch(2)]
            engine.train_batch(batches, num_targets(batches, ranks.world_size))
            norms[backend, strategy, scale] = float(engine.clip_grad_norm(1.0))
    reference = norms["torch", "ddp", 1.0]
    for case, norm in norms.items():
        assert norm == pytest.approx(reference, rel=2e-2), case


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_gradient_norms_are_those_of_the_unscaled_loss() -> None:
    run_on_ranks(_norm_does_not_know_the_scale, 2, timeout_s=240)


def _accelerate_zero3(ranks: Ranks) -> None:
    # On a CPU Accelerate would drop the plugin and train plain DDP: the engine notices.
    with pytest.raises(RuntimeError, match="Accelerate trains with MULTI_CPU"):
        tiny_engine(ranks, "zero3", backend="accelerate")

    def with_plugin(device: torch.device, dtype: torch.dtype, block_classes: list[str]) -> Any:
        accelerator = accelerate_engine.build_accelerator(device)
        accelerator.state.fsdp_plugin = accelerate_engine.fsdp_plugin(dtype, block_classes)
        return accelerator

    # What the plugin does, it does here too, once Accelerate's choice by device is out of the way.
    original, accelerate_engine.fsdp_accelerator = accelerate_engine.fsdp_accelerator, with_plugin  # type: ignore[assignment]
    reference = train_steps(tiny_engine(ranks, "zero3"), ranks)
    engine = tiny_engine(ranks, "zero3", backend="accelerate")
    accelerate_engine.fsdp_accelerator = original
    assert train_steps(engine, ranks) == pytest.approx(reference, rel=1e-6)
    assert all(part.tensor.numel() < math.prod(part.global_shape) for part in engine.state(with_optimizer=False))


@pytest.mark.timeout(300)
def test_accelerate_shards_through_its_plugin_or_not_at_all() -> None:
    run_on_ranks(_accelerate_zero3, 2, timeout_s=240)


def _offload(ranks: Ranks) -> None:
    for strategy, extra in (("zero2", {}), ("zero3", {"offload_parameters": "cpu"})):
        reference = train_steps(tiny_engine(ranks, strategy, backend="deepspeed"), ranks)
        engine = tiny_engine(ranks, strategy, backend="deepspeed", offload_optimizer="cpu", **extra)
        assert train_steps(engine, ranks) == pytest.approx(reference, rel=1e-6), strategy
        assert any(part.name.endswith("exp_avg") for part in engine.state(with_optimizer=True))


@pytest.mark.timeout(300)
def test_offloaded_state_trains_the_same() -> None:
    run_on_ranks(_offload, 2, timeout_s=240)
