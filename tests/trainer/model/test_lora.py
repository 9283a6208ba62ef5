"""Adapters beside the weights of a model: which layers get them, what they begin as, and what they stand beside."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from sharding.mesh import build_mesh
from sharding.ranks.errors import UserError
from sharding.ranks.process_group import Ranks
from sharding.state import MODEL_PREFIX
from tests.runs_in_process import RunsInProcess, saved_state
from tests.sharding.engine_cases import FACTS, random_batch, tiny_config
from tests.support import TINY_MODEL, run_on_ranks
from tests.trainer.model.head_tasks import ParityOfFirst
from trainer.config import parse_config
from trainer.config.sections import ModelConfig
from trainer.model.engine import build_model_engine
from trainer.model.lora import add_adapters, plain_name
from trainer.model.models import ModelFacts, build_model_on_meta
from trainer.tasks.registry import build_task
from trainer.tasks.task import Task

_ALONE = Ranks(rank=0, world_size=1, local_rank=0, local_world_size=1, device=torch.device("cpu"))
_SIZES = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
_LLAMA = {"architecture": "llama", "config": _SIZES | {"num_key_value_heads": 2, "vocab_size": 301}}


def _built(targets: str | list[str], **model: Any) -> Any:
    settings = ModelConfig(**_LLAMA | model | {"lora": {"rank": 3, "targets": targets}})
    built = build_model_on_meta(build_task("causal-lm"), settings, FACTS)
    add_adapters(built, settings)
    return built


def _adapted(model: Any) -> list[str]:
    return [name.removesuffix(".lora_A.default.weight") for name in model.state_dict() if "lora_A" in name]


def _engine(folder: Path, seed: int = 0, task: Task | None = None, **model: Any) -> tuple[Any, ModelFacts]:
    sections = {"model": {"pretrained": str(folder), **model}, "data": {"sequence_length": 16}, "seed": seed}
    config = tiny_config({"strategy": "none"}, **sections)
    return build_model_engine(
        config, task or build_task("causal-lm"), build_mesh(config.parallel, _ALONE), _ALONE, FACTS
    )


def _state(engine: Any) -> dict[str, torch.Tensor]:
    return {part.name.removeprefix(MODEL_PREFIX): part.tensor for part in engine.state(with_optimizer=False)}


def test_layers_are_named_by_their_ends_whole_or_by_a_pattern() -> None:
    of_first = "model.layers.0.self_attn."
    assert _adapted(_built("q_proj")) == [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    assert _adapted(_built(f"{of_first}q_proj")) == [f"{of_first}q_proj"]
    assert _adapted(_built([f"{of_first}[qk]*", "self_attn.v_proj"])) == [
        *(f"{of_first}{kind}_proj" for kind in "qkv"),
        "model.layers.1.self_attn.v_proj",
    ]
    every = _built("all-linear")
    assert len(_adapted(every)) == 2 * 7
    assert {name for name, p in every.named_parameters() if p.requires_grad} == {
        name for name in every.state_dict() if "lora_" in name
    }
    assert type(every) is LlamaForCausalLM
    # The output projection is tied in one and not in the other.
    assert "lm_head" in _adapted(_built("*", config=_LLAMA["config"] | {"tie_word_embeddings": False}))
    with pytest.raises(UserError, match=r"targets: \* matches lm_head, whose weight the model uses in another place"):
        _built("*", config=_LLAMA["config"] | {"tie_word_embeddings": True})


def test_what_cannot_be_meant_is_a_sentence() -> None:
    with pytest.raises(UserError, match=r"query matches no linear layer of this Llama.*; there are q_proj, k_proj"):
        _built(["q_proj", "query"])
    with pytest.raises(UserError, match="embed_tokens matches no linear layer"):
        _built("embed_tokens")

    def parsed(**sections: Any) -> None:
        parse_config({"steps": 1, "model": TINY_MODEL} | sections, "test")

    scratch = TINY_MODEL | {"lora": {"rank": 4}}
    with pytest.raises(UserError, match=r"model\.lora\.rank=4 trains adapters beside weights .* neither"):
        parsed(model=scratch)
    parsed(model=scratch, checkpoint={"from": "runs/other"})
    with pytest.raises(UserError, match=r"alpha=8\.0 goes with model\.lora\.rank only, which is 0"):
        parsed(model=TINY_MODEL | {"lora": {"alpha": 8.0}})
    pretrained = {"pretrained": "some/model", "lora": {"rank": 4}}
    with pytest.raises(UserError, match=r"model\.resize_vocabulary=true goes without model\.lora\.rank only"):
        parsed(model=pretrained | {"resize_vocabulary": True})
    with pytest.raises(UserError, match=r"model\.lora\.rank=4 goes with precision\.compute=auto, fp32, bf16 or fp16"):
        parsed(model=pretrained, precision={"compute": "fp8"})


def test_a_model_begins_as_the_one_without_adapters(tmp_path: Path) -> None:
    torch.manual_seed(0)
    for name, model in (
        ("llama", LlamaForCausalLM(LlamaConfig(vocab_size=301, num_key_value_heads=2, **_SIZES))),
        # It keeps its matrices as [inputs, outputs].
        ("gpt2", GPT2LMHeadModel(GPT2Config(vocab_size=301, n_embd=32, n_layer=2, n_head=2, n_positions=16))),
    ):
        model.save_pretrained(tmp_path / name)
        engine, facts = _engine(tmp_path / name, lora={"rank": 4})
        assert facts.notes[0].startswith("LoRA of rank 4, scaled by 2, beside ")
        state, stored = _state(engine), model.state_dict()
        for key, tensor in state.items():
            if "lora_" not in key:
                assert torch.equal(tensor, stored[plain_name(key)]), key
        first, second = ([t for key, t in state.items() if kind in key] for kind in ("lora_A", "lora_B"))
        assert len(first) == len(second) == (14 if name == "llama" else 8)
        assert all(tensor.abs().max() == 0 for tensor in second)
        # As torch draws a linear layer's: uniform up to 1 / sqrt(inputs).
        assert all(0.5 < tensor.abs().max() * math.sqrt(tensor.shape[1]) < 1 for tensor in first)
        whole, _ = _engine(tmp_path / name)
        assert torch.equal(*(e.evaluate([random_batch(0)])[0] for e in (engine, whole)))
    # A function of the seed and the name.
    again, other = (_state(_engine(tmp_path / "gpt2", seed, lora={"rank": 4})[0]) for seed in (0, 1))
    assert all(torch.equal(tensor, again[key]) for key, tensor in state.items())
    assert not any(torch.equal(tensor, other[key]) for key, tensor in state.items() if "lora_A" in key)


def test_a_new_head_is_trained_beside_adapters(tmp_path: Path) -> None:
    BertForMaskedLM(BertConfig(vocab_size=301, **_SIZES)).save_pretrained(tmp_path)
    # A pattern that would match the head, too, which is trained as a whole.
    engine, facts = _engine(tmp_path, task=ParityOfFirst({}), new_head=True, lora={"rank": 2, "targets": "*"})
    trained = {name for name, parameter in engine.named_parameters() if parameter.requires_grad}
    head = {"classifier.weight", "classifier.bias", "bert.pooler.dense.weight", "bert.pooler.dense.bias"}
    assert {name for name in trained if "lora_" not in name} == head
    assert len(trained) == len(head) + 2 * 2 * 6
    assert "adapters and the head are trained" in facts.notes[0]
    assert facts.notes[1].startswith("new head: bert.pooler.dense.weight [32, 32], ")


def _begin_with_another_run(ranks: Ranks, root: Path, corpus: Path) -> None:
    runs = RunsInProcess(ranks, root, corpus)
    whole = runs.train("base", steps=2)

    def tune(
        name: str, source: str, *, load: str = "weights", steps: int = 3, parallel: Any = None, **lora: Any
    ) -> Any:
        model = TINY_MODEL | {"lora": lora}
        checkpoint = {"from": str(root / "runs" / source), "load": load}
        parallel = parallel or {"strategy": "zero3"}
        return runs.train(name, steps=steps, model=model, checkpoint=checkpoint, parallel=parallel)

    lora: dict[str, Any] = {"rank": 2, "targets": ["q_proj", "v_proj"]}
    tuned = tune("tuned", "base", **lora)
    bucketed = tune("bucketed", "base", parallel={"strategy": "zero2", "backend": "bucketed"}, **lora)
    base, state = saved_state(whole, 2)[1], saved_state(tuned, 3)[1]
    adapters = {key for key in state if "lora_" in key and key.startswith("model/")}
    assert len(adapters) == 2 * 2 * 3
    # Nothing but adapters has moved, and all of them have; only they have moments.
    for key, tensor in state.items():
        if key.startswith("model/") and key not in adapters:
            assert torch.equal(tensor, base[plain_name(key)]), key
    assert {key.split("/")[1] for key in state if key.startswith("optimizer/")} == {
        key.removeprefix("model/") for key in adapters
    }
    assert all(state[key].abs().max() > 0 for key in adapters)
    for key in adapters:
        torch.testing.assert_close(state[key], saved_state(bucketed, 3)[1][key], rtol=0, atol=1e-3)
    # Another run's adapters come along, or a sentence.
    again = tune("again", "tuned", **lora)
    assert any(not torch.equal(saved_state(again, 3)[1][key], state[key]) for key in adapters)
    with pytest.raises(UserError, match=r"has adapters \(LoRA\) of 6 layers, such as .*q_proj, but .* 3 others"):
        tune("others", "tuned", rank=2, targets="q_proj")
    with pytest.raises(UserError, match=r"rank 2 scaled by 2, but model\.lora says rank 2 and 4"):
        tune("louder", "tuned", alpha=8.0, **lora)
    # No less where the optimizer's state comes along; it does where nothing differs.
    with pytest.raises(UserError, match=r"rank 2 scaled by 2, but model\.lora says rank 2 and 4"):
        tune("louder-fork", "tuned", load="all", steps=4, alpha=8.0, **lora)
    tune("fork", "tuned", load="all", steps=4, alpha=4.0, **lora)
    with pytest.raises(UserError, match=r"has adapters \(LoRA\) of 6 layers, .*, but this run has none, since"):
        tune("none", "tuned")


def test_adapters_beside_the_weights_of_another_run(tmp_path: Path, shared_corpus: tuple[Path, Path]) -> None:
    run_on_ranks(_begin_with_another_run, 2, tmp_path, shared_corpus[0])
