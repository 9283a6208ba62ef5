"""Pretrained weights: as `from_pretrained` loads them, bit for bit, and each rank reads its slices alone."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config

from sharding.part import Box, whole_box
from sharding.ranks.errors import UserError
from sharding.ranks.object_exchange import sum_integers_over_ranks
from sharding.ranks.process_group import Ranks
from tests.sharding.engine_cases import FACTS, tiny_config
from tests.support import run_on_ranks
from trainer.architectures.config import build_model_config
from trainer.config import RunConfig, parse_config
from trainer.config.sections import ModelConfig
from trainer.model.models import build_model_on_meta
from trainer.model.pretrained import PretrainedWeights
from trainer.model.stored_tensor import StoredTensor
from trainer.tasks.registry import build_task

_SIZES = {
    "hidden_size": 12,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "tie_word_embeddings": False,
}
_HEADS = {"num_key_value_heads": 2}
_EXPERTS = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 10}
_MODELS: dict[str, dict[str, Any]] = {
    "llama": _SIZES | {"tie_word_embeddings": True},
    "gpt_neox": {key: value for key, value in _SIZES.items() if key != "num_key_value_heads"},
    "mixtral": _SIZES | {"num_local_experts": 3},
    "qwen3_moe": _SIZES | _EXPERTS,
    "olmoe": _SIZES | _HEADS | {"num_experts": 3, "num_experts_per_tok": 2},
    "deepseek_v3": _SIZES | _HEADS | {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2,
        "moe_intermediate_size": 10, "first_k_dense_replace": 1, "q_lora_rank": 6, "kv_lora_rank": 6,
        "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 6},
    "jamba": _SIZES | _HEADS | {"num_experts": 2, "num_experts_per_tok": 1, "expert_layer_period": 2,
        "expert_layer_offset": 1, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4,
        "mamba_dt_rank": 4, "use_mamba_kernels": False},
}  # fmt: skip

_ALONE = Ranks(rank=0, world_size=1, local_rank=0, local_world_size=1, device=torch.device("cpu"))


def _save(folder: Path, architecture: str, **options: Any) -> Path:
    """A folder that `transformers` wrote, of a model with values of its own in every tensor."""
    config = build_model_config(ModelConfig(architecture=architecture, config=_MODELS[architecture]), FACTS)
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
    model.save_pretrained(folder, **options)
    return folder


def _weights(folder: Path) -> PretrainedWeights:
    settings = ModelConfig(pretrained=str(folder))
    return PretrainedWeights(str(folder), build_model_on_meta(build_task("causal-lm"), settings, FACTS))


def _all_of(tensor: torch.Tensor) -> Box:
    return whole_box(tuple(tensor.shape))


def _middle_of(tensor: torch.Tensor) -> Box:
    shape = tuple(tensor.shape)
    return Box(tuple(size // 3 for size in shape), tuple((size + 1) // 2 for size in shape))


class _OtherNames(nn.Module):
    """The parts of a Llama under names of one's own."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        model = build_model_on_meta(build_task("causal-lm"), ModelConfig(pretrained=str(folder)), FACTS)
        self.body, self.head = model.get_submodule("model"), model.get_submodule("lm_head")


def test_a_task_names_the_weights_that_its_model_begins_with(tmp_path: Path) -> None:
    model = _OtherNames(_save(tmp_path, "llama"))
    stored = load_file(tmp_path / "model.safetensors")

    def pretrained_name(name: str) -> str:
        return name.replace("body.", "model.").replace("head.", "lm_head.")

    weights = PretrainedWeights(str(tmp_path), model, pretrained_name)
    # The head is tied to the embedding, and not stored.
    assert {pretrained_name(name) for name in model.state_dict()} == stored.keys() | {"lm_head.weight"}
    for name, tensor in model.body.state_dict(prefix="body.").items():
        assert torch.equal(weights.tensors[name].read(_all_of(tensor)), stored[pretrained_name(name)]), name
    with pytest.raises(UserError, match=r"has no weights for body\."):
        PretrainedWeights(str(tmp_path), model)


@pytest.mark.parametrize("architecture", _MODELS)
def test_weights_are_those_that_transformers_loads(architecture: str, tmp_path: Path) -> None:
    _save(tmp_path, architecture, max_shard_size="4KB")
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).state_dict()
    weights = _weights(tmp_path)
    renamed = set(weights.stored) - set(expected)
    assert bool(renamed) == (architecture != "llama")
    tied = {"lm_head.weight"} if architecture == "llama" else set()
    assert set(weights.tensors) == set(expected) - tied
    for name, tensor in weights.tensors.items():
        assert torch.equal(tensor.read(_all_of(tensor)), expected[name]), name
        # A part of a converted tensor is read as a part.
        box = _middle_of(tensor)
        assert torch.equal(tensor.read(box), expected[name][box.slices]), name


def test_a_part_of_joined_and_stacked_tensors_is_read_alone() -> None:
    num_read = 0

    def stored(tensor: torch.Tensor) -> StoredTensor:
        def read(box: Box) -> torch.Tensor:
            nonlocal num_read
            num_read += box.num_elements
            return tensor[box.slices]

        return StoredTensor(tensor.shape, tensor.dtype, read)

    def convert(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        stacked = torch.stack(tensors[:3])
        joined = torch.cat([stacked, torch.stack(tensors[1:4])], dim=1)
        turned = torch.transpose(joined, 1, 2).contiguous()
        cut = torch.split(tensors[3], [2, 4])
        # Not one of those that are done on parts.
        other = tensors[4].view(3, 2, 4).transpose(1, 2).reshape(12, 2)
        return [stacked, joined, turned, *torch.chunk(turned, 2, dim=-1), *cut, other]

    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(6, 4, generator=generator) for _ in range(5)]
    expected = convert(tensors)
    made = convert([stored(tensor) for tensor in tensors])
    assert num_read == 0
    for want, have in zip(expected, made, strict=True):
        assert isinstance(have, StoredTensor)
        for box in (_all_of(want), _middle_of(want)):
            num_read = 0
            assert torch.equal(have.read(box), want[box.slices])
            assert num_read == box.num_elements or want is expected[-1]
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        torch.cat([stored(tensors[0]), stored(tensors[1][:, :2])])


def _pretrained_config(folder: Path, parallel: dict[str, str]) -> RunConfig:
    values = tiny_config(parallel).model_dump(mode="json")
    values |= {"model": {"pretrained": str(folder)}, "data": {"sequence_length": 16}}
    return parse_config(values, "test")


_PARALLELS = [
    {"strategy": "ddp"},
    {"strategy": "zero3"},
    {"strategy": "zero3", "backend": "bucketed"},
    {"strategy": "zero3", "backend": "deepspeed"},
]


def _load(ranks: Ranks, folders: list[Path]) -> None:
    from sharding.mesh import build_mesh
    from trainer.model.engine import build_model_engine

    for folder in folders:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        expected = model.state_dict()
        num_elements = sum({id(t): t.numel() for t in model.state_dict(keep_vars=True).values()}.values())
        for parallel in _PARALLELS:
            config = _pretrained_config(folder, parallel)
            mesh = build_mesh(config.parallel, ranks)
            engine, _ = build_model_engine(config, build_task("causal-lm"), mesh, ranks, FACTS)
            parts = engine.state(with_optimizer=False)
            num_written = sum(part.tensor.numel() for part in parts if part.is_written_here)
            assert sum_integers_over_ranks(num_written, ranks) == num_elements, parallel
            for part in parts:
                whole = expected[part.name.removeprefix("model/")]
                assert all(torch.equal(piece, whole[box.slices]) for box, piece in part.pieces()), part.name


def test_each_rank_reads_its_slices_of_pretrained_weights(tmp_path: Path) -> None:
    folders = [_save(tmp_path / name, name, max_shard_size="4KB") for name in ("llama", "mixtral", "deepseek_v3")]
    # Saved without its head, as GPT-2's own weights are: names lack the prefix.
    config = GPT2Config(n_embd=10, n_layer=2, n_head=2, vocab_size=301, n_positions=32)
    AutoModelForCausalLM.from_config(config).transformer.save_pretrained(tmp_path / "base")
    run_on_ranks(_load, 2, [*folders, tmp_path / "base"])


def _change(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("architecture", "key"),
    [
        ("llama", "model.layers.1.mlp.up_proj.weight"),
        ("mixtral", "model.layers.0.block_sparse_moe.experts.1.w3.weight"),
        # A buffer, but one that training changes.
        ("deepseek_v3", "model.layers.1.mlp.gate.e_score_correction_bias"),
        ("llama", "model.embed_tokens.weight"),
    ],
)
def test_missing_weights_are_refused(architecture: str, key: str, tmp_path: Path) -> None:
    _save(tmp_path, architecture)
    _change(tmp_path, lambda tensors: tensors.pop(key))
    with pytest.raises(UserError, match=r"model\.pretrained=\S+ (has no weights for|has|cannot be converted)"):
        _weights(tmp_path)


def test_an_expert_too_few_is_refused(tmp_path: Path) -> None:
    _save(tmp_path, "mixtral")

    def without_last_expert(tensors: dict[str, torch.Tensor]) -> None:
        for key in [key for key in tensors if ".experts.2." in key]:
            del tensors[key]

    _change(tmp_path, without_last_expert)
    with pytest.raises(UserError, match=r"in shape \[2, 48, 12\], but its configuration makes it \[3, 48, 12\]"):
        _weights(tmp_path)


def test_quantized_weights_are_refused(tmp_path: Path) -> None:
    _save(tmp_path, "llama")

    def quantize(tensors: dict[str, torch.Tensor]) -> None:
        key = "model.layers.0.mlp.up_proj.weight"
        tensors[key] = tensors[key].to(torch.float8_e4m3fn)

    _change(tmp_path, quantize)
    with pytest.raises(UserError, match=r"up_proj\.weight in float8_e4m3fn, which is quantized"):
        _weights(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"model\.pretrained=\S+ is quantized"):
        _weights(tmp_path)


def test_tied_weights_that_differ_are_refused(tmp_path: Path) -> None:
    from sharding.mesh import build_mesh
    from trainer.model.engine import build_model_engine

    _save(tmp_path, "llama")
    config = _pretrained_config(tmp_path, {"strategy": "none"})

    def load() -> None:
        mesh = build_mesh(config.parallel, _ALONE)
        build_model_engine(config, build_task("causal-lm"), mesh, _ALONE, FACTS)

    def with_head(shift: float) -> Any:
        def change(tensors: dict[str, torch.Tensor]) -> None:
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + shift

        return change

    _change(tmp_path, with_head(0.0))
    load()
    _change(tmp_path, with_head(1.0))
    with pytest.raises(UserError, match=r"different weights for model\.embed_tokens\.weight and lm_head\.weight"):
        load()


def test_only_what_from_pretrained_reads_is_read(tmp_path: Path) -> None:
    _save(tmp_path, "llama")
    # Some publishers lay their own form beside it.
    save_file({"model.norm.weight": torch.zeros(12)}, tmp_path / "consolidated.safetensors")
    weights = _weights(tmp_path)
    assert math.prod(weights.tensors["model.norm.weight"].read(whole_box((12,))).tolist()) != 0
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no model\.safetensors; save it with save_pretrained first"):
        _weights(tmp_path)
