"""Models: size, arithmetic, blocks by structure."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

from sharding.blocks import find_blocks
from trainer.architectures.config import build_model_config
from trainer.config.sections import ModelConfig
from trainer.data.facts import SampleFacts
from trainer.model.models import ModelFacts, build_model_on_meta, model_facts
from trainer.tasks.causal_lm import CausalLanguageModelling
from trainer.tasks.registry import build_task

_SAMPLES = SampleFacts(16, 100, 0)


def _facts(architecture: str, freeze: Sequence[str] = (), **config: Any) -> ModelFacts:
    settings = ModelConfig(architecture=architecture, config=config, freeze=tuple(freeze))
    model_config = build_model_config(settings, _SAMPLES)
    return model_facts(build_model_on_meta(build_task("causal-lm"), settings, _SAMPLES), model_config)


_LLAMA = {
    "hidden_size": 8,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
# Per block: q and o 8 x 8, k and v 8 x 4, three matrices 8 x 24, and two gains of 8 that are no matrices.
_BLOCK_MATRICES = 2 * 64 + 2 * 32 + 3 * 192


@pytest.mark.parametrize("tied", [True, False])
def test_an_input_embedding_counts_only_as_the_output_projection(tied: bool) -> None:
    facts = _facts("llama", **_LLAMA, tie_word_embeddings=tied)
    embedding = 100 * 8
    assert facts.num_matrix_parameters == 2 * _BLOCK_MATRICES + embedding
    assert facts.num_parameters == 2 * (_BLOCK_MATRICES + 16) + 8 + embedding * (1 if tied else 2)
    dense = 6 * facts.num_matrix_parameters
    assert facts.flops_per_token(16, causal=False) == dense + 12 * 2 * 8 * 16
    assert facts.flops_per_token(16, causal=True) == dense + 6 * 2 * 8 * 16


@pytest.mark.parametrize(
    ("multiple", "asked", "expected"),
    [(0, None, 100), (1, None, 100), (7, None, 105), (64, None, 128), (50, None, 100), (64, 130, 192), (64, 128, 128)],
)
def test_the_vocabulary_is_padded_to_a_multiple(multiple: int, asked: int | None, expected: int) -> None:
    sizes = _LLAMA if asked is None else _LLAMA | {"vocab_size": asked}
    model = ModelConfig(architecture="llama", config=sizes, vocab_multiple=multiple)
    model_config = build_model_config(model, _SAMPLES)
    assert model_config.vocab_size == expected
    facts = model_facts(build_model_on_meta(build_task("causal-lm"), model, _SAMPLES), model_config)
    # The padded rows are multiplied like all others, and count as such.
    assert facts.num_matrix_parameters == 2 * _BLOCK_MATRICES + expected * 8


@pytest.mark.parametrize(
    ("frozen", "trained", "back", "num_layers_back"),
    [
        # All lies behind the embedding, which is no matrix.
        (["model.layers.*"], 800, 2 * _BLOCK_MATRICES + 800, 2),
        (["model.embed_tokens.*", "model.layers.0.*"], _BLOCK_MATRICES + 800, _BLOCK_MATRICES + 800, 1),
        # Of the head alone: no gradient of its input.
        (["model.*"], 800, 0, 0),
        (
            ["model.embed_tokens.*", "*.up_proj.*", "lm_head.*"],
            2 * (_BLOCK_MATRICES - 192),
            2 * _BLOCK_MATRICES + 800,
            2,
        ),
    ],
)
def test_what_backward_leaves_out_is_not_counted(
    frozen: list[str], trained: int, back: int, num_layers_back: int
) -> None:
    facts = _facts("llama", frozen, **_LLAMA, tie_word_embeddings=False)
    num = 2 * _BLOCK_MATRICES + 800
    assert facts.num_matrix_parameters == num
    products = 2 * num + 2 * back + 2 * trained
    assert facts.flops_per_token(16, causal=False) == products + (4 * 2 + 8 * num_layers_back) * 8 * 16
    assert facts.flops_per_token(16, causal=True) == products + (2 * 2 + 4 * num_layers_back) * 8 * 16


def test_position_embeddings_are_looked_up_and_not_multiplied() -> None:
    facts = _facts("gpt2", n_embd=8, n_layer=1, n_head=2)
    assert facts.num_matrix_parameters == 8 * 24 + 8 * 8 + 8 * 32 + 32 * 8 + 100 * 8


@pytest.mark.parametrize(
    ("architecture", "config", "first", "count"),
    [
        ("llama", _LLAMA, "model.layers.0", 2),
        ("gpt2", {"n_embd": 8, "n_layer": 3, "n_head": 2}, "transformer.h.0", 3),
        ("qwen3", _LLAMA | {"head_dim": 4}, "model.layers.0", 2),
        ("gpt_neox", {k: v for k, v in _LLAMA.items() if "key_value" not in k}, "gpt_neox.layers.0", 2),
        ("opt", {"hidden_size": 8, "ffn_dim": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
                 "word_embed_proj_dim": 8}, "model.decoder.layers.0", 2),
    ],
)  # fmt: skip
def test_blocks_are_found_by_structure(architecture: str, config: dict[str, Any], first: str, count: int) -> None:
    settings = ModelConfig(architecture=architecture, config=config)
    model = build_model_on_meta(build_task("causal-lm"), settings, _SAMPLES)
    blocks = find_blocks(model)
    assert (blocks[0][0], len(blocks)) == (first, count)
    assert all(parameter.is_meta for parameter in model.parameters())


class _Drawn(nn.Module):
    """Its constructor draws, for this old way to make a tensor heeds no default device."""

    def __init__(self) -> None:
        super().__init__()
        self.first = self.second = nn.Parameter(torch.Tensor(3).uniform_())
        self.layer = nn.Linear(3, 2)


class _DrawingTask(CausalLanguageModelling):
    def build_model(self, model_settings: ModelConfig, facts: SampleFacts) -> nn.Module:
        return _Drawn()


def test_what_a_constructor_draws_all_the_same_is_not_kept() -> None:
    model = build_model_on_meta(_DrawingTask(), ModelConfig(architecture="llama"), _SAMPLES)
    assert [name for name, p in model.named_parameters() if not p.is_meta] == []
    assert model.first is model.second


class _FaultyTask(CausalLanguageModelling):
    def build_model(self, model_settings: ModelConfig, facts: SampleFacts) -> nn.Module:
        raise ValueError("a fault of its own")


def test_a_fault_of_a_model_of_ones_own_is_shown_as_it_is() -> None:
    with pytest.raises(ValueError, match="a fault of its own"):
        build_model_on_meta(_FaultyTask(), ModelConfig(factory="own:make"), _SAMPLES)
