"""Pretrained weights and token ids: what a model was trained with, or a sentence, and never ids of another meaning."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from sharding.ranks.errors import UserError
from sharding.ranks.process_group import Ranks
from tests.runs_in_process import RunsInProcess, saved_state
from tests.support import run_on_ranks, tiny_values
from trainer.checkpoint.reader import CheckpointReader
from trainer.checkpoint.token_ids import check_named_tokenizer
from trainer.config import RunConfig, load_config, parse_config
from trainer.data.prepare import prepare_corpus
from trainer.data.tokenizer import train_byte_level_bpe
from trainer.deploy.export import export_model


def _config(tmp_path: Path, pretrained: str, **data: Any) -> RunConfig:
    values = tiny_values(tmp_path, tmp_path / "cache", tmp_path / "corpus")
    values["model"] = {"pretrained": pretrained}
    values["data"] |= data
    return parse_config(values, "test")


def _save_tokenizer(folder: Path, text: str, num_added: int = 0) -> str:
    tokenizer = train_byte_level_bpe([text] * 3, 290)
    tokenizer.add_tokens([f"<added-{number}>" for number in range(num_added)])
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_pretrained_model_has_its_own_tokenizer_unless_another_is_named(tmp_path: Path) -> None:
    assert _config(tmp_path, "some/model").data.tokenizer == "some/model"
    assert _config(tmp_path, "some/model", tokenizer="other").data.tokenizer == "other"
    values = tiny_values(tmp_path, tmp_path, tmp_path)
    assert parse_config(values, "test").data.tokenizer == "train-bpe"
    # What is frozen is what was trained with, so that it reads back to the same.
    config = _config(tmp_path, "some/model")
    assert parse_config(config.model_dump(mode="json"), "test") == config


def test_a_named_tokenizer_must_have_the_ids_of_the_model(tmp_path: Path) -> None:
    own = _save_tokenizer(tmp_path / "own", "some words that are merged")
    check_named_tokenizer(_config(tmp_path, own))
    same = _save_tokenizer(tmp_path / "same", "some words that are merged")
    check_named_tokenizer(_config(tmp_path, own, tokenizer=same))
    other = _save_tokenizer(tmp_path / "other", "quite another text to merge")
    config = _config(tmp_path, own, tokenizer=other)
    for prepared in (None, Path(other)):
        with pytest.raises(
            UserError, match=rf"data.tokenizer={other} does not have the token ids of .*={own}, .*'.* ha"
        ):
            check_named_tokenizer(config, prepared)
    more = _save_tokenizer(tmp_path / "more", "some words that are merged", num_added=2)
    first_added = len(AutoTokenizer.from_pretrained(own))
    with pytest.raises(UserError, match=rf"'<added-0>' has id {first_added} and is not there"):
        check_named_tokenizer(_config(tmp_path, own, tokenizer=more))
    # Fewer tokens have no other meaning.
    check_named_tokenizer(_config(tmp_path, more, tokenizer=own))
    with pytest.raises(UserError, match=r"data\.tokenizer=train-bpe makes new ids"):
        check_named_tokenizer(_config(tmp_path, own, tokenizer="train-bpe"))


def test_a_model_without_a_tokenizer_needs_one_named(tmp_path: Path) -> None:
    own = _save_tokenizer(tmp_path / "own", "some words that are merged")
    (tmp_path / "model").mkdir()
    with pytest.raises(UserError, match=r"the tokenizer of model\.pretrained=.* cannot be loaded"):
        check_named_tokenizer(_config(tmp_path, str(tmp_path / "model")))
    check_named_tokenizer(_config(tmp_path, str(tmp_path / "model"), tokenizer=own))


def _begin_with_other_weights(ranks: Ranks, root: Path, corpus: Path) -> None:
    runs = RunsInProcess(ranks, root, corpus)
    first = runs.train("first", steps=1)
    if ranks.rank == 0:
        export_model(CheckpointReader(first.checkpoint_path(1)), root / "model")
    none = {"architecture": None, "config": {}}

    # Its own tokenizer, though the corpus would give another one.
    own = runs.train("own", steps=1, model=none | {"pretrained": str(root / "model")}, data={"max_documents": 5})
    config = load_config(own.config_file)
    assert config.data.tokenizer == str(root / "model")
    vocabulary = AutoTokenizer.from_pretrained(root / "model").get_vocab()
    assert AutoTokenizer.from_pretrained(prepare_corpus(config.data).tokenizer_dir).get_vocab() == vocabulary
    assert saved_state(own, 1)[0].step == 1

    # On all ranks alike, though one of them looks.
    other = {"data": {"max_documents": 5, "tokenizer": "train-bpe"}}
    with pytest.raises(UserError, match=r"data\.tokenizer=train-bpe makes new ids"):
        runs.train("foreign", steps=1, model=none | {"pretrained": str(root / "model")}, **other)
    forked = {"checkpoint": {"from": str(first.path), "load": "weights"}}
    with pytest.raises(UserError, match="the tokenizer of this run's corpus does not have the token ids of checkpoint"):
        runs.train("warm", steps=1, **forked, **other)
    # Other documents, and the ids that the weights know.
    named = {"data": {"max_documents": 5, "tokenizer": str(root / "model")}}
    assert saved_state(runs.train("known", steps=1, **forked, **named), 1)[0].step == 1


def test_runs_that_begin_with_other_weights(tmp_path: Path, shared_corpus: tuple[Path, Path]) -> None:
    run_on_ranks(_begin_with_other_weights, 2, tmp_path, shared_corpus[0])
