"""Tokens that a pretrained model does not know: their rows are the mean of the others, on any ranks, and leave so."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM

from sharding.part import Box, whole_box
from sharding.ranks.errors import UserError
from sharding.ranks.process_group import Ranks
from tests.runs_in_process import RunsInProcess, saved_state
from tests.support import TINY_MODEL, run_on_ranks, tiny_values
from trainer.checkpoint.reader import CheckpointReader
from trainer.checkpoint.token_ids import check_named_tokenizer
from trainer.config import parse_config
from trainer.config.sections import ModelConfig
from trainer.data.facts import SampleFacts
from trainer.data.tokenizer import train_byte_level_bpe
from trainer.deploy.export import export_model
from trainer.model.models import build_model_on_meta
from trainer.model.pretrained import PretrainedWeights
from trainer.tasks.registry import build_task

_NONE: dict[str, Any] = {"architecture": None, "config": {}}
_NEW = ["<|user|>", "<|assistant|>"]


def _save_llama(folder: Path, text: str, *, tied: bool) -> int:
    """A model, and its tokenizer with two tokens more than it has rows; returns the rows."""
    tokenizer = train_byte_level_bpe([text] * 3, 290)
    num_rows = len(tokenizer)
    tokenizer.add_tokens(_NEW, special_tokens=True)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = TINY_MODEL["config"] | {"tie_word_embeddings": tied}
    LlamaForCausalLM(LlamaConfig(vocab_size=num_rows, **config)).save_pretrained(folder)
    return num_rows


def _weights(folder: Path, task: str, num_tokens: int) -> tuple[Any, PretrainedWeights]:
    settings = ModelConfig(pretrained=str(folder), resize_vocabulary=True)
    model = build_model_on_meta(build_task(task), settings, SampleFacts(16, num_tokens, 0))
    return model, PretrainedWeights(str(folder), model, resizes_vocabulary=True)


def _check_rows(read: torch.Tensor, stored: torch.Tensor, num_new: int) -> None:
    torch.testing.assert_close(read[: len(stored)], stored, rtol=0, atol=0)
    mean = stored.double().mean(dim=0).float()
    torch.testing.assert_close(read[len(stored) :], mean.expand(num_new, *mean.shape), rtol=0, atol=1e-8)


def test_any_part_of_the_new_rows_is_read_alike(tmp_path: Path) -> None:
    num_rows = _save_llama(tmp_path, "some words", tied=False)
    model, weights = _weights(tmp_path, "causal-lm", num_rows + 3)
    assert weights.new_rows == f"vocabulary: 3 tokens added to {num_rows}, whose mean is each one's embedding"
    stored = LlamaForCausalLM.from_pretrained(tmp_path).state_dict()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensor = weights.tensors[name]
        whole = tensor.read(whole_box((num_rows + 3, 30)))
        _check_rows(whole, stored[name], 3)
        for box in (Box((num_rows - 2, 7), (4, 11)), Box((num_rows + 1, 0), (2, 30)), Box((3, 29), (5, 1))):
            assert torch.equal(tensor.read(box), whole[box.slices])
    # Room that is there already is used.
    assert _weights(tmp_path, "causal-lm", num_rows)[1].new_rows == ""
    assert model.config.vocab_size == num_rows + 3


def test_a_bias_of_the_output_has_a_value_more(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    bert = BertForMaskedLM(BertConfig(vocab_size=301, **sizes))
    torch.nn.init.normal_(bert.cls.predictions.bias)
    bert.save_pretrained(tmp_path)
    _, weights = _weights(tmp_path, "masked-lm", 304)
    bias = weights.tensors["cls.predictions.bias"]
    _check_rows(bias.read(whole_box((304,))), bert.cls.predictions.bias.detach(), 3)


def _resize(ranks: Ranks, root: Path, corpus: Path, num_rows: int) -> None:
    runs = RunsInProcess(ranks, root, corpus)
    model = _NONE | {"pretrained": str(root / "model"), "resize_vocabulary": True}
    hashes = set()
    for index, parallel in enumerate(
        (
            {"strategy": "zero3"},
            {"strategy": "zero2", "backend": "bucketed"},
            {"strategy": "zero3", "backend": "deepspeed"},
        )
    ):
        name = f"run-{index}"
        folder = runs.train(name, steps=2, model=model, parallel=parallel)
        if ranks.rank == 0:
            hashes |= set(re.findall("initial parameters (.*)", runs.console(name)))
            assert f"vocabulary: 2 tokens added to {num_rows}" in runs.console(name)
    if ranks.rank:
        return
    assert len(hashes) == 1
    reader = CheckpointReader(folder.checkpoint_path(2))
    export_model(reader, root / "exported")
    exported = AutoModelForCausalLM.from_pretrained(root / "exported")
    tokenizer = AutoTokenizer.from_pretrained(root / "exported")
    assert exported.config.vocab_size == len(tokenizer) == num_rows + 2
    assert tokenizer.convert_tokens_to_ids(_NEW) == [num_rows, num_rows + 1]
    _, state = saved_state(folder, 2)
    for name, tensor in exported.state_dict().items():
        # Tied to the embedding, and not stored.
        if name != "lm_head.weight":
            assert torch.equal(tensor, state[f"model/{name}"]), name


def test_runs_with_new_tokens_begin_alike_and_leave_as_they_are(
    tmp_path: Path, shared_corpus: tuple[Path, Path]
) -> None:
    text = (shared_corpus[0] / "00.txt").read_text()
    num_rows = _save_llama(tmp_path / "model", text, tied=True)
    run_on_ranks(_resize, 2, tmp_path, shared_corpus[0], num_rows)


def test_without_the_setting_it_is_named(tmp_path: Path) -> None:
    own = str(tmp_path / "model")
    num_rows = _save_llama(tmp_path / "model", "some words that are merged", tied=True)
    with pytest.raises(UserError, match=rf"smaller than .*'s {num_rows + 2} tokens; set model\.resize_vocabulary=true"):
        build_model_on_meta(build_task("causal-lm"), ModelConfig(pretrained=own), SampleFacts(16, num_rows + 2, 0))
    tokenizer = AutoTokenizer.from_pretrained(own)
    tokenizer.add_tokens(["<|tool|>"])
    tokenizer.save_pretrained(tmp_path / "more")

    def check(tokenizer: str, **model: Any) -> None:
        values = tiny_values(tmp_path, tmp_path / "cache", tmp_path / "corpus")
        values |= {"model": {"pretrained": own, **model}}
        values["data"] |= {"tokenizer": tokenizer}
        check_named_tokenizer(parse_config(values, "test"))

    with pytest.raises(
        UserError, match=r"has id .* is not there.*, or set model\.resize_vocabulary=true, since it only"
    ):
        check(str(tmp_path / "more"))
    check(str(tmp_path / "more"), resize_vocabulary=True)
    train_byte_level_bpe(["quite another text to merge"] * 3, 290).save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match=r"to use the model's own\.$"):
        check(str(tmp_path / "other"), resize_vocabulary=True)
