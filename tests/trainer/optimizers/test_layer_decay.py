"""Rates by depth: embeddings least, the head all of it, on top of groups, under every engine."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from sharding.ranks.errors import UserError
from sharding.ranks.process_group import Ranks
from tests.sharding.engine_cases import random_batch, tiny_engine
from tests.support import run_on_ranks
from trainer.optimizers.layer_decay import depth_scales, describe_depth_scales
from trainer.parity.cases import write_parameters

_SIZES = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}


_ENGINES = (
    ("torch", "ddp"),
    ("torch", "zero3"),
    ("bucketed", "zero2"),
    ("deepspeed", "zero1"),
    ("deepspeed", "zero3"),
    ("accelerate", "ddp"),
)


def test_each_block_has_a_lower_rate_than_the_one_behind_it() -> None:
    with torch.device("meta"):
        llama = LlamaForCausalLM(LlamaConfig(vocab_size=301, tie_word_embeddings=False, **_SIZES))
        bert = BertForSequenceClassification(BertConfig(vocab_size=301, **_SIZES))
    scales = depth_scales(llama, 0.5)
    assert scales.keys() == dict(llama.named_parameters()).keys()
    assert scales["model.embed_tokens.weight"] == 0.5**4
    assert [scales[f"model.layers.{i}.mlp.up_proj.weight"] for i in range(3)] == [0.5**3, 0.5**2, 0.5]
    assert scales["model.norm.weight"] == scales["lm_head.weight"] == 1.0
    assert describe_depth_scales(scales, 0.5) == (
        "layer decay 0.5: rates from x 0.0625 (model.embed_tokens.weight) to x 1 (model.norm.weight)"
    )
    scales = depth_scales(bert, 0.5)
    assert scales["bert.embeddings.LayerNorm.bias"] == scales["bert.embeddings.word_embeddings.weight"] == 0.5**4
    assert scales["bert.pooler.dense.weight"] == scales["classifier.weight"] == 1.0
    assert depth_scales(llama, 1.0) == {}
    for parameter in llama.model.embed_tokens.parameters():
        parameter.requires_grad_(False)
    assert "model.embed_tokens.weight" not in depth_scales(llama, 0.5)
    with pytest.raises(UserError, match=r"layer_decay=0\.5 is a factor .*, but this Linear has none"):
        depth_scales(nn.Linear(2, 2), 0.5)


def _changes(ranks: Ranks, root: Path, backend: str, strategy: str, **optimizer: Any) -> dict[str, torch.Tensor]:
    """Of whole parameters, on rank 0."""
    # Plain SGD without clipping: what changes is the rate times the gradient.
    settings = {"name": "sgd", "lr": 0.1, "momentum": 0.0, "weight_decay": 0.0, "clip_norm": 0.0, **optimizer}
    engine = tiny_engine(ranks, strategy, backend=backend, optimizer=settings)
    write_parameters(engine, ranks, root / "before")
    engine.train_batch([random_batch(0)], 48)
    engine.clip_grad_norm(0.0)
    engine.step(0.1)
    write_parameters(engine, ranks, root / "after")
    if ranks.rank:
        return {}
    before = load_file(root / "before")
    return {name: tensor - before[name] for name, tensor in load_file(root / "after").items()}


def _compare_rates(ranks: Ranks, root: Path) -> None:
    groups = [{"pattern": "*.mlp.*", "lr_scale": 3.0}]
    for backend, strategy in _ENGINES:
        plain, decayed = (
            _changes(ranks, root, backend, strategy, **optimizer)
            for optimizer in ({}, {"layer_decay": 0.5, "groups": groups})
        )
        for name, change in decayed.items():
            depth = 4 if "embed" in name else 3 - int(name.split(".")[2]) if ".layers." in name else 0
            factor = 0.5**depth * (3.0 if ".mlp." in name else 1.0)
            torch.testing.assert_close(change, plain[name] * factor, rtol=1e-3, atol=1e-7)
            assert change.abs().max() > 0, (backend, strategy, name)


@pytest.mark.timeout(300)
def test_every_engine_has_these_rates(tmp_path: Path) -> None:
    run_on_ranks(_compare_rates, 2, tmp_path, timeout_s=250)
