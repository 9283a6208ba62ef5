"""Parameters that only some ranks use: data decide, and no rank waits for another or gets another's gradient."""

import functools
from typing import Any

import pytest
import torch
from torch import nn

from sharding.config import ParallelConfig
from sharding.ddp import DdpEngine
from sharding.engine import ModelDefinition
from sharding.memory_formula import BUCKET_ELEMENTS
from sharding.mesh import build_mesh
from sharding.ranks.errors import UserError
from sharding.ranks.process_group import Ranks
from sharding.reached import ReachedParameters
from tests.sharding.engine_cases import num_targets, random_batch, tiny_engine
from tests.support import run_on_ranks

_SGD = {"optimizer": {"name": "sgd", "lr": 0.1, "weight_decay": 0.0}}


class _Sometimes:
    """A function that takes turns with a replacement, at other calls than on the next rank."""

    def __init__(self, function: Any, replacement: Any, phase: int, num_turns: int = 2) -> None:
        self._function = function
        self._replacement = replacement
        self._phase = phase
        self._num_turns = num_turns
        self.num_calls = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.num_calls += 1
        chosen = self._replacement if (self.num_calls + self._phase) % self._num_turns else self._function
        return chosen(*args, **kwargs)


def _skip_a_parameter(model: Any, rank: int) -> _Sometimes:
    mlp = model.model.layers[1].mlp
    mlp.forward = _Sometimes(mlp.forward, lambda x: mlp.down_proj(mlp.up_proj(x)), rank)
    return mlp.forward


def _skip_outside(model: Any, rank: int) -> _Sometimes:
    norm = model.model.norm
    norm.forward = _Sometimes(norm.forward, lambda x: x, rank)
    return norm.forward


def _skip_blocks(model: Any, rank: int) -> list[_Sometimes]:
    """The two last blocks are not even called."""
    return [_skip_block(block, rank) for block in model.model.layers[1:]]


def _skip_most_blocks(model: Any, rank: int) -> list[_Sometimes]:
    """Each block is called in every third pass alone: at times none of them is."""
    return [_skip_block(block, index + rank, num_turns=3) for index, block in enumerate(model.model.layers)]


def _skip_block(block: nn.Module, phase: int, num_turns: int = 2) -> _Sometimes:
    cls = type(block)
    call = _Sometimes(
        lambda *args, **kwargs: cls.__call__(block, *args, **kwargs), lambda hidden, **_: hidden, phase, num_turns
    )
    block.__class__ = type(cls.__name__, (cls,), {"__call__": lambda _self, *args, **kwargs: call(*args, **kwargs)})
    return call


def _model_of(engine: Any) -> Any:
    return engine._model if hasattr(engine, "_model") else engine._definition.model


def _batches(ranks: Ranks, num_micro_batches: int) -> list[dict[str, torch.Tensor]]:
    return [random_batch(7 * ranks.rank + index) for index in range(num_micro_batches)]


@functools.cache
def _expected(ranks: Ranks, skip: Any, num_micro_batches: int) -> dict[str, torch.Tensor]:
    """Parameters after a step of plain SGD on the sum of all ranks' gradients."""
    engine: Any = tiny_engine(ranks, "ddp", **_SGD)
    model, batches = engine._model, _batches(ranks, num_micro_batches)
    names, parameters = zip(*model.named_parameters(), strict=True)
    total = [torch.zeros_like(p) for p in parameters]
    skip(model, ranks.rank)
    for batch in batches:
        loss = engine._loss(model, batch) / num_targets(batches, ranks.world_size)
        for sum_, gradient in zip(total, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True):
            if gradient is not None:
                sum_ += gradient
    for sum_ in total:
        torch.distributed.all_reduce(sum_)
    return {name: p.detach() - 0.1 * sum_ for name, p, sum_ in zip(names, parameters, total, strict=True)}


def _check(ranks: Ranks, backend: str, strategy: str, skip: Any) -> None:
    for num_micro_batches in (1, 4):
        case = (backend, strategy, skip.__name__, num_micro_batches)
        engine: Any = tiny_engine(ranks, strategy, backend=backend, **_SGD)
        batches = _batches(ranks, num_micro_batches)
        counters = skip(_model_of(engine), ranks.rank)
        for is_kept in (False, True):
            for counter in counters if isinstance(counters, list) else [counters]:
                counter.num_calls = 0
            engine.train_batch(batches, num_targets(batches, ranks.world_size))
            engine.clip_grad_norm(0.0)
            if not is_kept:
                engine.drop_gradients()
        engine.step(0.1)
        # The passes of evaluation take turns as well.
        for _ in range(3):
            engine.evaluate(batches[:1])
        # Once for all engines.
        expected = _expected(ranks, skip, num_micro_batches)
        for part in engine.state(with_optimizer=False):
            whole = expected[part.name.removeprefix("model/")]
            for box, piece in part.pieces():
                torch.testing.assert_close(piece, whole[box.slices], rtol=1e-5, atol=1e-6, msg=f"{case} {part.name}")


def _all(ranks: Ranks) -> None:
    # Many more buckets than may be under way at a time.
    BUCKET_ELEMENTS["cpu"] = 512
    for backend, strategies in (
        ("torch", ("ddp", "zero1", "zero2", "zero3")),
        ("bucketed", ("zero1", "zero2", "zero3")),
        ("accelerate", ("ddp",)),
    ):
        for strategy in strategies:
            skips: list[Any] = [_skip_a_parameter]
            if (backend, strategy) in (("torch", "ddp"), ("bucketed", "zero1"), ("bucketed", "zero3")):
                skips += [_skip_outside, _skip_blocks, _skip_most_blocks]
            for skip in skips:
                _check(ranks, backend, strategy, skip)


@pytest.mark.timeout(300)
def test_what_a_rank_does_not_use_contributes_zeros() -> None:
    run_on_ranks(_all, 2, timeout_s=240)


def _differ(ranks: Ranks) -> None:
    first, second = (nn.Parameter(torch.ones(2)) for _ in range(2))
    for must_be_alike in (False, True):
        reached = ReachedParameters([first, second], None, must_be_alike=must_be_alike)
        (first + second if ranks.rank == 0 else first).sum().backward()
        reached.end_step()
        reached.exchange()
        if must_be_alike and ranks.rank == 1:
            with pytest.raises(RuntimeError, match="gradients would be added up wrongly"):
                reached.unreached()
        else:
            assert reached.unreached() == []
        # What no rank reaches is alike.
        first.sum().backward()
        reached.end_step()
        reached.exchange()
        assert reached.unreached() == [1]


def test_ranks_that_must_reach_the_same_parameters_end_where_they_have_not() -> None:
    run_on_ranks(_differ, 2)


def _refused(ranks: Ranks) -> None:
    """Where ranks must do the same, those that do not are told so, all of them, and none waits."""
    for backend, strategy, skip, found in (
        ("torch", "zero1", _skip_blocks, "model.layers.1 where another came to the end of its pass"),
        ("torch", "zero3", _skip_blocks, "model.layers.1 where another came to the end of its pass"),
        ("deepspeed", "zero1", _skip_a_parameter, "model.layers.1.mlp.gate_proj.weight was used by some ranks only"),
        ("deepspeed", "zero2", _skip_blocks, "model.layers.1.* was used by some ranks only"),
        ("deepspeed", "zero3", _skip_outside, "model.norm.weight was used by some ranks only"),
        ("deepspeed", "zero3", _skip_blocks, "model.layers.1 where another came to model.norm"),
    ):
        engine: Any = tiny_engine(ranks, strategy, backend=backend, **_SGD)
        batches = _batches(ranks, 2)
        skip(_model_of(engine), ranks.rank)
        with pytest.raises(UserError, match=f"^parallel.backend={backend} with parallel.strategy={strategy} .*{found}"):
            engine.train_batch(batches, num_targets(batches, ranks.world_size))


@pytest.mark.timeout(300)
def test_where_all_ranks_must_run_the_same_a_sentence_says_so() -> None:
    run_on_ranks(_refused, 2, timeout_s=240)


class _LargeRoot(nn.Module):
    """More in its root than a bucket of DDP holds, a layer for some ranks, and a parameter for none."""

    def __init__(self) -> None:
        super().__init__()
        self.large = nn.Parameter(torch.ones(1024, 512))
        self.unused = nn.Parameter(torch.ones(3))
        self.layer = nn.Linear(512, 1)

    def forward(self, x: torch.Tensor, *, with_layer: bool) -> torch.Tensor:
        hidden = x @ self.large
        return self.layer(hidden).sum() if with_layer else hidden.sum()


def _in_the_root(ranks: Ranks) -> None:
    torch.manual_seed(0)
    model = _LargeRoot()
    definition = ModelDefinition(
        model,
        initialize=lambda _: None,
        loss=lambda module, batch: module(batch["x"], with_layer=bool(batch["with_layer"])),
        evaluate=lambda module, batch: module(batch["x"], with_layer=True),
        seed=0,
    )
    engine = DdpEngine(
        definition,
        build_mesh(ParallelConfig(strategy="ddp"), ranks),
        ranks.device,
        None,
        lambda parts: torch.optim.AdamW([part.tensor for part in parts], lr=0.1, weight_decay=0.5, fused=True),
    )
    # On one rank, on none, and on the other.
    for rank_with_layer in (0, None, 1):
        before = [parameter.detach().clone() for parameter in model.parameters()]
        batch = {"x": torch.full((2, 1024), 1e-3), "with_layer": torch.tensor(ranks.rank == rank_with_layer)}
        engine.train_batch([batch, batch], 4)
        engine.step(0.1)
        moved = [not torch.equal(one, other) for one, other in zip(before, model.parameters(), strict=True)]
        assert moved == [True, False, *[rank_with_layer is not None] * 2]
        for parameter in model.parameters():
            others = [torch.empty_like(parameter) for _ in range(ranks.world_size)]
            torch.distributed.all_gather(others, parameter.detach())
            assert torch.equal(*others)


def test_what_ddp_reached_is_told_whatever_lies_in_the_root() -> None:
    run_on_ranks(_in_the_root, 2)
