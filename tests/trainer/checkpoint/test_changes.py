"""Settings that a continued run may change: they take effect, are written down, and hold from then on."""

from pathlib import Path
from typing import Any

import pytest
import torch

from sharding.ranks.errors import UserError
from sharding.ranks.process_group import Ranks
from tests.runs_in_process import RunsInProcess, computed_lines, saved_state
from tests.support import run_on_ranks, tiny_values, write_corpus, write_empty_checkpoint
from trainer.attempt import begin_attempt, check_continuation
from trainer.checkpoint.manifest import read_manifest, write_manifest
from trainer.config import RunConfig, parse_config
from trainer.config.rules import World
from trainer.report.event_rows import event_rows
from trainer.run_folder.events import read_events
from trainer.run_folder.folder import RunFolder

pytestmark = pytest.mark.timeout(120)

_BACKENDS = (("torch", "zero3"), ("bucketed", "zero1"), ("deepspeed", "zero2"), ("accelerate", "ddp"))
_OLD = {"lr": 1e-2, "weight_decay": 0.1, "eps": 1e-6}
_NEW = _OLD | {"lr": 4e-3, "weight_decay": 0.7}
_CONSTANT = {"name": "constant", "warmup_steps": 0, "total_steps": 0}
_ALLOWED = {"allow_changes": ["optimizer.lr", "optimizer.weight_decay"]}
_EVERY_STEP = {"every_steps": 1, "keep_last": 0}


def _config(root: Path, **sections: Any) -> RunConfig:
    values = tiny_values(root / "runs", root / "cache", root / "corpus") | {"name": "tiny"}
    for key, section in sections.items():
        values[key] = values.get(key, {}) | section if isinstance(section, dict) else section
    return parse_config(values, "test")


@pytest.mark.parametrize("key", ["optimizer.name", "optimizer", "schedule.cosine", "model", "lr", "seed"])
def test_nothing_else_may_be_allowed(tmp_path: Path, key: str) -> None:
    with pytest.raises(UserError, match=f"^checkpoint.allow_changes={key}: a run may change optimizer.lr, .* alone; "):
        _config(tmp_path, checkpoint={"allow_changes": [key]})


def test_a_change_is_refused_with_its_remedy_and_held_to_from_then_on(tmp_path: Path) -> None:
    first = _config(tmp_path)
    folder = RunFolder.of(first)
    begin_attempt(folder, first, World(1, has_gpu=False), [])
    write_empty_checkpoint(folder.checkpoint_path(3), 3)
    changed = {"optimizer": {"lr": 0.5}, "model": {"attention": "eager"}}
    with pytest.raises(UserError, match=r"allow the change with checkpoint.allow_changes='.model.attention, optim"):
        check_continuation(folder, _config(tmp_path, **changed))
    with pytest.raises(UserError, match=r"optimizer.lr: frozen 0.01, now 0.5.; .*='.schedule, optimizer.lr.'"):
        check_continuation(folder, _config(tmp_path, optimizer={"lr": 0.5}, checkpoint={"allow_changes": "schedule"}))
    # What can never be allowed has no such remedy.
    with pytest.raises(UserError, match=r"seed: frozen .*checkpoint.from=[^ ]*$"):
        check_continuation(folder, _config(tmp_path, seed=99, optimizer={"lr": 0.5}))
    allowed = _config(tmp_path, **changed, checkpoint={"allow_changes": ["optimizer.lr", "model.attention"]})
    assert begin_attempt(folder, allowed, World(1, has_gpu=False), []) == 2
    # From now on this is what the run is held to; nothing more is to be allowed.
    check_continuation(folder, _config(tmp_path, **changed))
    with pytest.raises(UserError, match=r"optimizer.lr: frozen 0.5, now 0.01"):
        check_continuation(folder, first)


def _train(ranks: Ranks, root: Path, corpus: Path) -> None:
    runs = RunsInProcess(ranks, root, corpus)
    shared: dict[str, Any] = {"schedule": _CONSTANT, "checkpoint": _EVERY_STEP}
    for backend, strategy in _BACKENDS:
        parallel = {"backend": backend, "strategy": strategy}
        runs.train(backend, steps=3, optimizer=_OLD, parallel=parallel, **shared)
        allowed = shared | {"checkpoint": _EVERY_STEP | _ALLOWED}
        runs.train(backend, steps=5, optimizer=_NEW, parallel=parallel, **allowed)
    # In two attempts, the later of which need not be allowed anything.
    runs.train("pieces", steps=3, optimizer=_OLD, **shared)
    runs.train("pieces", stop_at=5, optimizer=_NEW, **(shared | {"checkpoint": _EVERY_STEP | _ALLOWED}))
    runs.train("pieces", steps=5, optimizer=_NEW, **shared)
    for compute in ("bf16", "fp32"):
        sections = {"precision": {"compute": compute}, "checkpoint": _EVERY_STEP}
        folder = runs.train(compute, steps=1, **sections)
        if ranks.rank == 0:
            _take_rule_away(folder.checkpoint_path(1))
        for steps in (2, 3):
            runs.train(compute, steps=steps, **sections)


def _take_rule_away(checkpoint: Path) -> None:
    """Have a checkpoint say what it would in the release before there was a rule."""
    manifest = read_manifest(checkpoint)
    write_manifest(checkpoint, manifest.model_copy(update={"format_version": 4, "precision_rule": None}))
    assert b"precision_rule" not in (checkpoint / "manifest.json").read_bytes()


def _after_adamw(before: torch.Tensor, name: str, state: dict[str, torch.Tensor]) -> torch.Tensor:
    """The parameter after the fourth step, from the one before it and from the moments after it."""
    betas, decay = (0.9, 0.95), _NEW["weight_decay"] if before.ndim >= 2 else 0.0
    mean = state[f"optimizer/{name}/exp_avg"] / (1 - betas[0] ** 4)
    square = state[f"optimizer/{name}/exp_avg_sq"] / (1 - betas[1] ** 4)
    return before * (1 - _NEW["lr"] * decay) - _NEW["lr"] * mean / (square.sqrt() + _NEW["eps"])


def test_a_change_takes_effect_under_every_backend_and_is_written_down(tmp_path: Path) -> None:
    run_on_ranks(_train, 2, tmp_path, write_corpus(tmp_path / "corpus"))
    for backend, _ in _BACKENDS:
        folder = RunFolder(tmp_path / "runs" / backend)
        lines = computed_lines(folder)
        assert [line["train/learning_rate"] for line in lines] == [0.01] * 3 + [0.004] * 2
        (_, before), (_, after) = saved_state(folder, 3), saved_state(folder, 4)
        names = [name.removeprefix("model/") for name in before if name.startswith("model/")]
        for name in names:
            expected = _after_adamw(before[f"model/{name}"], name, after)
            torch.testing.assert_close(after[f"model/{name}"], expected, rtol=1e-6, atol=1e-7)
        changes = [event for event in read_events(folder.path) if event["kind"] == "setting_changed"]
        assert [(event["step"], event["setting"], event["old"], event["new"]) for event in changes] == [
            (3, "optimizer.lr", 0.01, 0.004),
            (3, "optimizer.weight_decay", 0.1, 0.7),
        ]
        assert "setting: optimizer.lr; old: 0.01; new: 0.004" in [row.details for row in event_rows(folder.path)]
        assert "optimizer.lr: 0.01 -> 0.004 at step 3" in (tmp_path / f"{backend}.log").read_text()
    folder = RunFolder(tmp_path / "runs" / "pieces")
    assert computed_lines(folder) == computed_lines(RunFolder(tmp_path / "runs" / "torch"))
    assert sum(event["kind"] == "setting_changed" for event in read_events(folder.path)) == 2
    # Once, in 16 bits alone.
    assert (tmp_path / "bf16.log").read_text().count("precision: step 1 was computed in fp32, or by an earlier") == 1
    assert "precision:" not in (tmp_path / "fp32.log").read_text()
    versions = {name: read_manifest(tmp_path / f"runs/{name}/checkpoints/step-00000003") for name in ("bf16", "fp32")}
    assert (versions["bf16"].format_version, versions["bf16"].precision_rule) == (6, 1)
    assert (versions["fp32"].format_version, versions["fp32"].precision_rule) == (4, None)
