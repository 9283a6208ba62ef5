"""Frozen parameters and buffers are part of the state under every engine, and training goes on exactly."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sharding.mesh import build_mesh
from sharding.ranks.process_group import Ranks
from tests.saved_state import save_state
from tests.sharding.engine_cases import FACTS, tiny_config, train_steps
from tests.support import run_on_ranks
from trainer.checkpoint.reader import CheckpointReader
from trainer.model.engine import build_model_engine
from trainer.tasks.causal_lm import CausalLanguageModelling

_CASES = (
    ("torch", "ddp"),
    ("torch", "zero3"),
    ("bucketed", "zero3"),
    ("deepspeed", "zero1"),
    ("deepspeed", "zero3"),
)


class _Frozen(CausalLanguageModelling):
    """The first block, the embedding and one norm do not train."""

    def build_model(self, model_settings: Any, facts: Any) -> nn.Module:
        model = super().build_model(model_settings, facts)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not name.startswith(("model.layers.0.", "model.embed", "model.norm")))
        return model


def _engine(ranks: Ranks, backend: str, strategy: str, seed: int = 0) -> Any:
    config = tiny_config({"strategy": strategy, "backend": backend}, seed=seed)
    engine: Any
    engine, _ = build_model_engine(config, _Frozen(), build_mesh(config.parallel, ranks), ranks, FACTS)
    model = engine._model if hasattr(engine, "_model") else engine._definition.model
    model.register_buffer("counts", torch.arange(5) + seed)
    return engine


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in CheckpointReader(folder).manifest.tensors.items()}


def _frozen_parts(engine: Any) -> dict[str, torch.Tensor]:
    return {
        part.name: part.tensor.clone()
        for part in engine.state(with_optimizer=False)
        if part.name.startswith(("model/model.layers.0.", "model/model.embed", "model/model.norm", "model/counts"))
    }


def _train_and_save(ranks: Ranks, root: Path) -> None:
    expected, shapes = None, None
    for backend, strategy in _CASES:
        case = (backend, strategy)
        engine = _engine(ranks, backend, strategy)
        before = _frozen_parts(engine)
        losses = train_steps(engine, ranks)
        assert all(torch.equal(part, before[name]) for name, part in _frozen_parts(engine).items()), case
        save_state(engine, root / f"{backend}-{strategy}", ranks)
        found = _shapes(root / f"{backend}-{strategy}")
        losses += train_steps(engine, ranks)
        expected, shapes = expected or losses, shapes or found
        assert losses == pytest.approx(expected, rel=1e-5), case
        assert found == shapes, case
        # Other initial values, all of which must be replaced.
        other = _engine(ranks, backend, strategy, seed=1)
        other.load_state(CheckpointReader(root / f"{backend}-{strategy}").read_into, with_optimizer=True)
        assert train_steps(other, ranks) == losses[3:], case
        for name, part in _frozen_parts(other).items():
            assert torch.equal(part, before[name]), (case, name)
    assert expected is not None
    for backend, saved_by in (("torch", "deepspeed-zero3"), ("deepspeed", "bucketed-zero3")):
        other = _engine(ranks, backend, "zero3", seed=1)
        other.load_state(CheckpointReader(root / saved_by).read_into, with_optimizer=True)
        assert train_steps(other, ranks, num_steps=1) == pytest.approx(expected[3:4], rel=1e-5), backend


@pytest.mark.timeout(300)
def test_frozen_parameters_and_buffers_are_saved_and_loaded(tmp_path: Path) -> None:
    run_on_ranks(_train_and_save, 2, tmp_path, timeout_s=240)
