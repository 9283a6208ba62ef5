"""One precision under every engine: 16 bits in computing, fp32 where anything is added up or kept."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

from sharding.compute_copies import ComputeCopies
from sharding.engine import Batch, Engine, ModelDefinition
from sharding.precision import computing_in
from sharding.ranks.errors import UserError
from sharding.ranks.process_group import Ranks
from tests.sharding.engine_cases import ON_2_RANKS, tiny_engine, train_steps
from tests.sharding.network_cases import TABLE, network_config, network_engine, random_rows
from tests.support import run_on_ranks

_NUM_REPEATS = 512
# Of the others the modules hold what is gathered while they compute.
_SHOWS_MASTERS = {("torch", "ddp"), ("accelerate", "ddp"), *(("deepspeed", f"zero{stage}") for stage in (1, 2, 3))}
# One of each way to add gradients up.
_MECHANISMS = (
    ("torch", "ddp"),
    ("torch", "zero2"),
    ("bucketed", "zero1"),
    ("bucketed", "zero3"),
    ("deepspeed", "zero2"),
)
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def _norm(engine: Engine, row: Batch, num_repeats: int, num_ranks: int) -> float:
    engine.train_batch([row] * num_repeats, num_repeats * num_ranks)
    norm = float(engine.clip_grad_norm(0.0))
    engine.drop_gradients()
    return norm


def _engine(ranks: Ranks, backend: str, strategy: str, compute: str, **arguments: Any) -> Engine:
    parallel = {"backend": backend, "strategy": strategy}
    precision: dict[str, Any] = {"compute": compute}
    if compute == "fp16":
        precision["initial_loss_scale"] = 2.0**14
    config = network_config("mlp", {"hidden_sizes": [8], **arguments}, parallel, precision=precision)
    return network_engine(config, TABLE, ranks)


def _repeat_a_row(ranks: Ranks, compute: str, pairs: Sequence[tuple[str, str]]) -> None:
    row = random_rows(TABLE, 1, seed=3)
    found = {}
    for backend, strategy in pairs:
        engine = _engine(ranks, backend, strategy, compute)
        found[f"{backend} {strategy}"] = [_norm(engine, row, number, ranks.world_size) for number in (1, _NUM_REPEATS)]
    assert all(one > 0 for one, _ in found.values()), found
    # Halving is exact; what is left is the rounding of fp32, and in fp16 of what falls below its smallest numbers.
    differing = {name: pair for name, pair in found.items() if pair[1] != pytest.approx(pair[0], rel=1e-4)}
    assert not differing, differing


def _look_inside_a_step(ranks: Ranks) -> None:
    rows = [random_rows(TABLE, 4, seed=index) for index in range(2)]
    for backend, strategy in ON_2_RANKS:
        engine = _engine(ranks, backend, strategy, "bf16", batch_norm=True)
        model: Any = getattr(engine, "_model", None) or engine._definition.model  # type: ignore[attr-defined]
        seen: dict[str, set[torch.dtype]] = {}

        def look(module: nn.Module, inputs: Any, output: Any, engine: Engine = engine, seen: Any = seen) -> None:
            seen.setdefault("weights", set()).add(module.weight.dtype)
            seen.setdefault("inputs", set()).add(inputs[0].dtype)
            seen.setdefault("outputs", set()).add(output.dtype)
            seen.setdefault("masters", set()).update(s.dtype for s in engine.named_local_shards().values())
            seen.setdefault("state", set()).update(
                part.tensor.dtype for part in engine.state(with_optimizer=False) if part.tensor.is_floating_point()
            )

        model.head.register_forward_hook(look)
        engine.train_batch(rows, 16)
        engine.clip_grad_norm(0.0)
        engine.step(0.1)
        engine.evaluate(rows[:1])
        where = f"{backend} {strategy}"
        assert seen["weights"] == seen["inputs"] == seen["outputs"] == {torch.bfloat16}, (where, seen)
        if (backend, strategy) in _SHOWS_MASTERS:
            assert seen["masters"] == seen["state"] == {torch.float32}, (where, seen)
            assert {p.dtype for _, p in engine.named_parameters()} == {torch.float32}, where
        buffers = {buffer.dtype for buffer in model.buffers() if buffer.is_floating_point()}
        assert buffers == {torch.float32}, where
        gradients = engine.named_local_gradients().values()
        assert {gradient.dtype for gradient in gradients} <= {torch.float32}, where


def _recompute(ranks: Ranks) -> None:
    for backend, strategy in (("torch", "ddp"), ("deepspeed", "zero3")):
        sections: dict[str, Any] = {"backend": backend, "precision": {"compute": "bf16"}}
        plain = train_steps(tiny_engine(ranks, strategy, **sections), ranks)
        recomputed = tiny_engine(ranks, strategy, activation_checkpointing={"mode": "full"}, **sections)
        assert train_steps(recomputed, ranks) == plain, backend


def _under_every_engine(ranks: Ranks) -> None:
    _repeat_a_row(ranks, "bf16", _MECHANISMS)
    _look_inside_a_step(ranks)
    _recompute(ranks)


def test_a_row_repeated_has_the_norm_of_one_and_masters_stay_fp32() -> None:
    run_on_ranks(_under_every_engine, 2, timeout_s=300)


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("compute", _DTYPES)
def test_a_row_repeated_has_that_norm_under_every_engine(compute: str) -> None:
    run_on_ranks(_repeat_a_row, 2, compute, ON_2_RANKS, timeout_s=380)


class _Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 1)
        self.scale: torch.Tensor
        self.register_buffer("scale", torch.ones(4))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.last(self.first(rows) * self.scale)
        return output


class _ScaledInItsFormat(_Scaled):
    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        scaled = self.first(rows) * self.scale
        output: torch.Tensor = self.last(scaled.to(self.last.weight.dtype))
        return output


def _computed_in(dtype: torch.dtype, model: nn.Module) -> torch.Tensor:
    def loss(called: nn.Module, batch: Batch) -> torch.Tensor:
        output = called(batch["rows"])
        assert output.dtype is torch.float32
        return output.square().sum()

    definition = ModelDefinition(model, lambda _: None, loss, loss, seed=0)
    computing = computing_in(definition, dtype)
    copies = ComputeCopies(model, dtype)
    with copies.in_place(has_gradients=True):
        found = computing.loss(model, {"rows": torch.randn(3, 4)})
        found.backward()
    return found


@pytest.mark.parametrize("dtype", _DTYPES.values())
def test_two_formats_in_a_model_of_ones_own_are_a_sentence(dtype: torch.dtype) -> None:
    with pytest.raises(
        UserError, match=r"two formats meet at .*test_precision.py, line \d+ \(.*precision.compute=fp32"
    ):
        _computed_in(dtype, _Scaled())
    model = _ScaledInItsFormat()
    _computed_in(dtype, model)
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}
    assert model.scale.dtype is torch.float32
    assert isinstance(model.first.weight, nn.Parameter)


def test_another_error_stays_what_it_is() -> None:
    class Broken(_Scaled):
        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("expected scalar type Long but found Int")

    with pytest.raises(RuntimeError, match="scalar type Long"):
        _computed_in(torch.bfloat16, Broken())
