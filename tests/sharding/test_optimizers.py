"""Own optimizers on several ranks: what is skipped, what travels, and what a checkpoint brings back."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from sharding.engine import Engine
from sharding.ranks.process_group import Ranks
from tests.saved_state import save_state, stored_state
from tests.sharding.engine_cases import num_targets, random_batch, tiny_engine, train_steps
from tests.support import TINY_MODEL, run_on_ranks
from trainer.checkpoint.reader import CheckpointReader

# With rows that can be quantised, and with fewer rows in k_proj than three ranks can share evenly or at all.
_MODEL = {
    "architecture": "llama",
    "config": TINY_MODEL["config"]
    | {"hidden_size": 96, "intermediate_size": 70, "num_key_value_heads": 1, "head_dim": 4},
}
_OWN = ("muon", "adafactor", "adamw8bit")


def _engine(ranks: Ranks, strategy: str, name: str) -> Engine:
    optimizer = {"name": name, "lr": 1e-2, "groups": [{"pattern": "*.0.mlp.*", "lr_scale": 0.5, "weight_decay": 0.0}]}
    return tiny_engine(ranks, strategy, model=_MODEL, optimizer=optimizer)


def _state(engine: Engine) -> dict[str, torch.Tensor]:
    return {part.name: part.tensor.clone() for part in engine.state(with_optimizer=True)}


def _skip(ranks: Ranks) -> None:
    for name in _OWN:
        for strategy in ("ddp", "zero2"):
            engine = _engine(ranks, strategy, name)
            for num_steps in (0, 2):
                # The first step of all may be the one that is skipped.
                train_steps(engine, ranks, num_steps=num_steps)
                before = _state(engine)
                engine.train_batch([random_batch(5)], num_targets([random_batch(5)], ranks.world_size))
                parameter = engine.named_parameters()[-1][1]
                if ranks.rank == 1:
                    parameter.grad.fill_(torch.nan)
                engine._found_nonfinite = torch.ones(())  # type: ignore[attr-defined]
                assert engine.step(1e-2) == 0.0
                after = _state(engine)
                assert before.keys() <= after.keys()
                for key, tensor in after.items():
                    expected = before[key] if key in before else torch.zeros_like(tensor)
                    assert torch.equal(tensor, expected), (name, strategy, key)
            train_steps(engine, ranks, num_steps=1)
            moved = [key for key, tensor in _state(engine).items() if not torch.equal(tensor, before[key])]
            assert any(key.startswith("model/") for key in moved), (name, strategy)


def test_a_skipped_step_leaves_parameters_and_state_alone() -> None:
    run_on_ranks(_skip, 2)


def _collectives_of_step(engine: Engine, ranks: Ranks) -> dict[str, int]:
    train_steps(engine, ranks, num_steps=1)
    batches = [random_batch(0)]
    engine.train_batch(batches, num_targets(batches, ranks.world_size))
    engine.clip_grad_norm(1.0)
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        engine.step(1e-2)
    return {
        event.key.removeprefix("c10d::"): event.count
        for event in recorded.key_averages()
        if event.key.startswith("c10d::")
    }


def _count_collectives(ranks: Ranks) -> None:
    for name, expected in (("muon", {"alltoall_base_": 2}), ("adafactor", {"allreduce_": 2}), ("adamw8bit", {})):
        assert _collectives_of_step(_engine(ranks, "zero2", name), ranks) == expected, name
        assert _collectives_of_step(_engine(ranks, "ddp", name), ranks) == {}, name


def test_a_step_makes_two_collectives_however_many_parameters() -> None:
    run_on_ranks(_count_collectives, 2)


def _assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], case: Any) -> None:
    assert found.keys() == expected.keys(), case
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), (case, key)


def _continue_same(ranks: Ranks, root: Path) -> None:
    """Six steps in one go, and three and three with a checkpoint between."""
    for name in _OWN:
        engine = _engine(ranks, "zero2", name)
        train_steps(engine, ranks)
        save_state(engine, root / name, ranks)
        losses = train_steps(engine, ranks)
        resumed = _engine(ranks, "zero2", name)
        resumed.load_state(CheckpointReader(root / name).read_into, with_optimizer=True)
        assert train_steps(resumed, ranks) == losses, name
        _assert_equal(_state(resumed), _state(engine), name)
        if ranks.rank == 0:
            torch.save(losses, root / f"{name}.losses")


def _continue_elsewhere(ranks: Ranks, root: Path, strategy: str, saved_by: str) -> None:
    """Another layout loads the state bit for bit, and then trains the same."""
    for name in _OWN:
        engine = _engine(ranks, strategy, name)
        engine.load_state(CheckpointReader(root / f"{name}{saved_by}").read_into, with_optimizer=True)
        folder = root / f"{name}-{strategy}-{ranks.world_size}"
        save_state(engine, folder, ranks)
        _assert_equal(stored_state(folder), stored_state(root / name), (name, strategy))
        losses = train_steps(engine, ranks)
        assert losses == pytest.approx(torch.load(root / f"{name}.losses"), rel=2e-5), (name, strategy)


@pytest.mark.timeout(400)
def test_state_continues_bit_for_bit_and_on_other_ranks(tmp_path: Path) -> None:
    run_on_ranks(_continue_same, 2, tmp_path, timeout_s=180)
    run_on_ranks(_continue_elsewhere, 3, tmp_path, "zero3", "", timeout_s=180)
    run_on_ranks(_continue_elsewhere, 1, tmp_path, "none", "-zero3-3", timeout_s=180)
    run_on_ranks(_continue_elsewhere, 2, tmp_path, "ddp", "-none-1", timeout_s=180)
    state = stored_state(tmp_path / "muon")
    assert "optimizer/model.layers.0.mlp.up_proj.weight/momentum_buffer" in state
    assert "optimizer/model.embed_tokens.weight/exp_avg_sq" in state
    state = stored_state(tmp_path / "adafactor")
    assert state["optimizer/model.layers.0.mlp.up_proj.weight/row_var"].shape == (70, 1)
    assert state["optimizer/model.layers.0.mlp.up_proj.weight/col_var"].shape == (1, 96)
    state = stored_state(tmp_path / "adamw8bit")
    assert state["optimizer/model.layers.0.mlp.up_proj.weight/exp_avg_codes"].dtype is torch.uint8
    assert state["optimizer/model.layers.0.mlp.up_proj.weight/exp_avg_scales"].shape == (70, 1)
    assert state["optimizer/model.layers.0.self_attn.k_proj.weight/exp_avg"].dtype is torch.float32
