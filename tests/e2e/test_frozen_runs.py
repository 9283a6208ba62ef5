"""A run with frozen parameters that is killed, and goes on elsewhere, against one that was left alone."""

import json
import shutil
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.saved_state import stored_state
from tests.support import refused, shardline, trained, training_curve
from trainer.run_folder.folder import RunFolder

MakeConfig = Callable[..., Path]
_FREEZE = {"freeze": ["model.embed_tokens.*", "model.layers.0.*", "model.layers.1.self_attn.*"]}
_EVERY_2 = {"every_steps": 2, "keep_last": 0}


def _tensors(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    return stored_state(RunFolder(run_dir).checkpoint_path(step))


@pytest.mark.timeout(300)
def test_a_killed_run_goes_on_under_any_engine_and_its_base_stays(make_config: MakeConfig) -> None:
    straight, config = (
        make_config(name, steps=6, checkpoint=_EVERY_2, parallel={"strategy": "zero3"}, model=_FREEZE)
        for name in ("straight", "pieces")
    )
    trained(shardline("run", straight, "--nproc-per-node", 2))
    runs = config.parent / "runs"
    checkpoints = runs / "pieces" / "checkpoints"
    # The first that is written is the base.
    fault = {"fault": "kill", "rank": 1, "step": 2, "phase": "write", "attempt": 1}
    killed = shardline("run", config, "--nproc-per-node", 2, SHARDLINE_INJECT=json.dumps([fault]))
    assert killed.returncode == 1
    assert "rank 1: the process was killed by SIGKILL" in killed.stderr
    assert not list(checkpoints.glob("*/manifest.json"))
    (base,) = checkpoints.glob("base-*")
    trained(shardline("run", config, "steps=3", "--nproc-per-node", 2))
    written = (base / "manifest.json").stat().st_mtime_ns
    deepspeed = ("parallel.backend=deepspeed", "parallel.strategy=zero2", "batch.micro_size=2")
    trained(shardline("run", config, *deepspeed, "steps=5", "--nproc-per-node", 3))
    trained(shardline("run", config, "parallel.strategy=none", "--nproc-per-node", 1))
    assert [path.name for path in checkpoints.glob("base-*")] == [base.name]
    assert (base / "manifest.json").stat().st_mtime_ns == written
    assert [path.name for path in (runs / "straight" / "checkpoints").glob("base-*")] == [base.name]
    for found, expected in zip(training_curve(runs / "pieces"), training_curve(runs / "straight"), strict=True):
        assert found[0] == expected[0]
        assert found[1] == pytest.approx(expected[1], rel=1e-5)
    first, last, other = _tensors(runs / "pieces", 2), _tensors(runs / "pieces", 6), _tensors(runs / "straight", 6)
    assert first.keys() == last.keys() == other.keys()
    for name, tensor in last.items():
        kind, parameter, *_ = name.split("/")
        is_frozen = any(fnmatchcase(parameter, pattern) for pattern in _FREEZE["freeze"])
        assert not (is_frozen and kind == "optimizer"), name
        if kind == "model":
            assert torch.equal(tensor, first[name]) == is_frozen, name
            torch.testing.assert_close(tensor, other[name], rtol=0.0, atol=1e-3)
    verified = shardline("checkpoint", "verify", runs / "pieces")
    assert verified.stdout.splitlines()[:2] == [f"{base.name}: complete", "step-00000002: complete"]
    assert verified.returncode == 0
    # A run that was frozen otherwise is another one.
    refused(shardline("run", config, "model.freeze=[model.embed_tokens.*]"), "model.freeze: frozen", "now")
    trained(shardline("export", runs / "pieces", "--to", runs / "exported"))
    exported = load_file(runs / "exported" / "model.safetensors")
    assert len(exported) > 3
    for name, tensor in exported.items():
        assert torch.equal(tensor, last[f"model/{name}"]), name
    # It is complete without its base no longer.
    shutil.rmtree(base)
    refused(shardline("run", config, "parallel.strategy=none", "--nproc-per-node", 1), f"{base.name} are corrupt")


def test_freezing_what_is_not_there_is_said_before_ranks_start(make_config: MakeConfig) -> None:
    config = make_config("nothing", model={"freeze": ["model.layer.*"]})
    refused(shardline("run", config, "--dry-run"), "model.freeze.0=model.layer.* matches no parameter; the nearest")
    everything = "model.freeze=['*']"
    refused(shardline("run", config, everything, "--dry-run"), "leaves nothing to train: LlamaForCausalLM has no other")
    refused(shardline("run", config, everything, "--nproc-per-node", 1), "leaves nothing to train")
