"""The order in which a model gets memory, values and its place on ranks, for every backend and strategy."""

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from sharding import build_engine
from sharding.engine import Engine
from sharding.engine_builder import EngineBuilder, EngineParts
from sharding.ranks.process_group import Ranks
from tests.sharding.engine_cases import tiny_engine, train_steps
from tests.support import run_on_ranks
from trainer.config.rules import BACKEND_STRATEGIES

# Others have the whole model on every rank until it is finished.
_FREES_BLOCKS = {
    *(("torch", strategy) for strategy in ("zero1", "zero2", "zero3")),
    *((backend, "zero3") for backend in ("bucketed", "deepspeed")),
}


class _Watched:
    """A builder that is held against the protocol's words."""

    def __init__(self, inner: EngineBuilder, parts: EngineParts) -> None:
        self._inner = inner
        self._parts = parts
        self._prepared: list[str] = []
        self._frees = (parts.parallel.backend, parts.parallel.strategy) in _FREES_BLOCKS
        assert all(parameter.is_meta for parameter in parts.definition.model.parameters())

    def prepare_block(self, name: str, block: nn.Module) -> None:
        number = len(self._prepared)
        assert (name, block) == self._parts.blocks[number]
        assert all(p.is_meta for _, later in self._parts.blocks[number + 1 :] for p in later.parameters())
        size = _held_bytes(block)
        assert size == sum(parameter.nbytes for parameter in block.parameters()) > 0
        assert all(parameter.isfinite().all() for parameter in block.parameters())
        self._inner.prepare_block(name, block)
        # The first of the bucketed engine stays, in a bucket with room for equal slices.
        frees = self._frees and (number or self._parts.parallel.backend != "bucketed")
        assert _held_bytes(block) <= (0.6 if frees else 1.05) * size
        self._prepared.append(name)

    def finish(self, model: nn.Module) -> Engine:
        assert model is self._parts.definition.model
        assert self._prepared == [name for name, _ in self._parts.blocks]
        assert not any(parameter.is_meta for parameter in model.parameters())
        return self._inner.finish(model)


def _held_bytes(module: nn.Module) -> int:
    local = [p.to_local() if isinstance(p, DTensor) else p for p in module.parameters()]
    return sum({storage.data_ptr(): storage.nbytes() for storage in map(torch.Tensor.untyped_storage, local)}.values())


def _build_all(ranks: Ranks) -> None:
    for backend, strategies in build_engine.BUILDERS.items():
        for strategy, build in list(strategies.items()):
            if strategy in ("none", "hsdp") or (backend, strategy) == ("accelerate", "zero3"):
                # For one rank, for four, and for GPUs.
                continue
            strategies[strategy] = lambda parts, build=build: _Watched(build(parts), parts)  # type: ignore[misc]
            settings: dict[str, Any] = {"backend": backend}
            losses = train_steps(tiny_engine(ranks, strategy, **settings), ranks, num_steps=1)
            assert torch.tensor(losses).isfinite().all(), (backend, strategy)


def test_one_block_after_another_is_whole() -> None:
    run_on_ranks(_build_all, 2)


def test_every_legal_pair_has_a_builder() -> None:
    assert {backend: set(found) for backend, found in build_engine.BUILDERS.items()} == {
        backend: set(strategies) for backend, strategies in BACKEND_STRATEGIES.items()
    }
