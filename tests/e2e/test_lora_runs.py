"""A run with adapters (LoRA) that is killed and goes on under other engines, against one that was left alone."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from tests.saved_state import stored_state
from tests.support import TINY_MODEL, refused, shardline, trained, training_curve
from trainer.data.tokenizer import train_byte_level_bpe
from trainer.run_folder.folder import RunFolder

MakeConfig = Callable[..., Path]
_EVERY_2 = {"every_steps": 2, "keep_last": 0}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, shared_corpus: tuple[Path, Path]) -> Path:
    """A pretrained model with its tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = train_byte_level_bpe([path.read_text() for path in sorted(shared_corpus[0].glob("*.txt"))], 301)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **TINY_MODEL["config"])).save_pretrained(folder)
    return folder


@pytest.mark.timeout(600)
def test_a_killed_run_moves_between_engines(make_config: MakeConfig, base: Path) -> None:
    model = {"pretrained": str(base), "lora": {"rank": 4, "alpha": 32.0, "targets": ["*_proj"]}}
    optimizer = {"layer_decay": 0.9}
    straight, config = (
        make_config(name, model, checkpoint=_EVERY_2, parallel={"strategy": "zero3"}, optimizer=optimizer)
        for name in ("straight", "pieces")
    )
    trained(shardline("run", straight, "--nproc-per-node", 2))
    trained(shardline("run", config, "steps=2", "--nproc-per-node", 2))
    runs = config.parent / "runs"
    checkpoints = runs / "pieces" / "checkpoints"
    deepspeed = ("parallel.backend=deepspeed", "parallel.strategy=zero2", "batch.micro_size=2", "--nproc-per-node", 3)
    fault = {"fault": "kill", "rank": 1, "step": 4, "phase": "train", "attempt": 2}
    killed = shardline("run", config, *deepspeed, SHARDLINE_INJECT=json.dumps([fault]))
    assert killed.returncode == 1
    assert "rank 1: the process was killed by SIGKILL" in killed.stderr
    trained(shardline("run", config, "steps=5", *deepspeed))
    trained(shardline("run", config, "parallel.strategy=none", "--nproc-per-node", 1))
    assert [line[0] for line in training_curve(runs / "pieces")] == [1, 2, 3, 4, 5, 6]
    for found, expected in zip(training_curve(runs / "pieces"), training_curve(runs / "straight"), strict=True):
        assert found[1] == pytest.approx(expected[1], rel=1e-5)
    # What is frozen lies there once, and is what the folder has.
    assert len(list(checkpoints.glob("base-*"))) == 1
    state = stored_state(RunFolder(runs / "pieces").checkpoint_path(6))
    stored, moments = load_file(base / "model.safetensors"), set()
    for name, tensor in state.items():
        kind, parameter, *_ = name.split("/")
        if kind == "optimizer":
            moments.add(parameter)
        elif "lora_" not in parameter:
            assert torch.equal(tensor, stored[parameter.replace(".base_layer.", ".")]), parameter
    assert moments == {name.removeprefix("model/") for name in state if name.startswith("model/") and "lora_" in name}
    assert len(moments) == 3 * 7 * 2
    assert all(state[f"model/{name}"].abs().max() > 0 for name in moments)
    # Adapters of another size are another run.
    refused(shardline("run", config, "model.lora.rank=8"), "model.lora.rank: frozen 4, now 8")


def test_what_adapters_cannot_stand_beside_is_said_before_ranks_start(make_config: MakeConfig, base: Path) -> None:
    model = {"pretrained": str(base), "lora": {"rank": 4}}
    config = make_config("tuned", model, optimizer={"layer_decay": 0.5})
    shown = shardline("run", config, "--dry-run")
    assert shown.returncode == 0, shown.stderr
    lines = [" ".join(line.split()) for line in shown.stdout.splitlines()]
    said = "adapters LoRA of rank 4, scaled by 2, beside q_proj x 3, k_proj x 3, v_proj x 3, o_proj x 3, gate_proj x 3"
    assert any(line.startswith(said) for line in lines), shown.stdout
    assert any(line.startswith("rates layer decay 0.5: rates from x 0.125 (model.layers.0") for line in lines)
    assert any(line.startswith("parameters") and line.endswith("of them trained") for line in lines)
    of_nothing = shardline("run", config, "--dry-run", "model.lora.targets=[query]")
    refused(of_nothing, "model.lora.targets: query matches no linear layer of this LlamaForCausalLM; there are q_proj")
    refused(shardline("run", config, "model.lora.targets=[query]", "--nproc-per-node", 1), "matches no linear layer")
    scratch = make_config("scratch", TINY_MODEL | {"lora": {"rank": 4}})
    refused(shardline("run", scratch), "model.lora.rank=4 trains adapters beside weights that stay as they are")
