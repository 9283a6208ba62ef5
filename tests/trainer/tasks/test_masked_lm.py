"""Masked language modelling: what is hidden, and that any layout trains what one process does."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders
from tokenizers.models import WordPiece
from tokenizers.pre_tokenizers import BertPreTokenizer
from transformers import AutoModelForMaskedLM, AutoTokenizer, PreTrainedTokenizerFast

from sharding.ranks.errors import UserError
from sharding.ranks.process_group import Ranks
from tests.runs_in_process import RunsInProcess, computed_lines
from tests.support import run_on_ranks, shardline, write_corpus
from trainer.checkpoint.reader import CheckpointReader
from trainer.config import parse_config
from trainer.config.sections import ModelConfig
from trainer.data.facts import SampleFacts
from trainer.data.identity import corpus_folder
from trainer.data.packed import packed_rows
from trainer.data.samples import FILLER
from trainer.data.tokenizer import MASK_ID, PADDING_ID, load_tokenizer, train_byte_level_bpe
from trainer.data.words import word_table
from trainer.deploy.export import export_model
from trainer.run_folder.folder import RunFolder
from trainer.tasks.masked_lm import MaskedLanguageModelling

_LENGTH = 64
_TEXT = Path(json.__file__).read_text()
_SIZES = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
_BERT = {
    "architecture": "bert",
    "config": {**_SIZES, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_byte_level_bpe([_TEXT], 400, masks=True)


@pytest.fixture(scope="module")
def facts(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> SampleFacts:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    return SampleFacts(_LENGTH, len(tokenizer), tokenizer.eos_token_id, folder, PADDING_ID, MASK_ID)


@pytest.fixture(scope="module")
def rows(tokenizer: PreTrainedTokenizerFast) -> Any:
    """All of a text, in rows of 64 tokens and one; the end of each row is the end of a document."""
    ids = np.array(tokenizer(_TEXT).input_ids)
    rows = ids[: len(ids) // (_LENGTH + 1) * (_LENGTH + 1)].reshape(-1, _LENGTH + 1)
    rows[:, _LENGTH - 1] = tokenizer.eos_token_id
    return rows


def test_a_trained_tokenizer_masks_only_where_that_is_asked_for(tokenizer: PreTrainedTokenizerFast) -> None:
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.mask_token_id) == (0, PADDING_ID, MASK_ID)
    plain = train_byte_level_bpe([_TEXT], 400)
    assert (plain.pad_token_id, plain.mask_token_id) == (plain.eos_token_id, None)
    values = {"steps": 1, "model": _BERT}
    causal = parse_config({**values, "model": {"architecture": "llama"}}, "test").data
    masked = parse_config({**values, "task": {"name": "masked-lm"}}, "test").data
    assert (causal.mask_token, masked.mask_token) == (False, True)
    assert corpus_folder(causal) != corpus_folder(masked)
    assert corpus_folder(causal) == corpus_folder(masked.model_copy(update={"mask_token": False}))


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"data": {"mask_token": False}}, "data.mask_token=false; remove it"),
        ({"data": {"document_mask": True}}, "data.document_mask=true keeps documents apart under task.name=causal-lm"),
        (
            {"task": {"name": "causal-lm", "whole_word": True}},
            "task.whole_word=true goes with task.name=masked-lm only",
        ),
    ],
)
def test_what_would_have_no_effect_is_refused(changed: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        parse_config({"steps": 1, "model": _BERT, "task": {"name": "masked-lm"}} | changed, "test")


@pytest.mark.parametrize("architecture", ["bert", "modernbert", "distilbert", "roberta"])
def test_encoders_of_transformers(facts: SampleFacts, rows: np.ndarray, architecture: str) -> None:
    sizes = _SIZES | {"max_position_embeddings": 70}
    if architecture == "distilbert":
        sizes = {"dim": 24, "hidden_dim": 40, "n_layers": 2, "n_heads": 2, "max_position_embeddings": 70}
    task = MaskedLanguageModelling(facts)
    model = task.build_model(ModelConfig(architecture=architecture, config=sizes), facts).eval()
    batch = task.make_batch(packed_rows(rows[:2].copy()), torch.arange(2), training=False)
    longer = {name: torch.nn.functional.pad(tensor, (0, 5), value=1) for name, tensor in batch.items()}
    longer["attention_mask"] = torch.nn.functional.pad(torch.ones(2, _LENGTH, dtype=torch.int64), (0, 5))
    with torch.no_grad():
        logits, padded = (task.forward(model, given).logits for given in (batch, longer))
    assert logits is not None
    assert padded is not None
    # What fills up changes nothing, and later tokens something.
    torch.testing.assert_close(padded[:, :_LENGTH], logits, rtol=1e-4, atol=1e-5)
    changed = batch | {"input_ids": batch["input_ids"].clone()}
    changed["input_ids"][:, -1] = 9
    with torch.no_grad():
        other = task.forward(model, changed).logits
    assert other is not None
    assert not torch.allclose(other[:, 0], logits[:, 0], atol=1e-7)


def test_models_that_cannot_fill_in(facts: SampleFacts) -> None:
    task = MaskedLanguageModelling(facts)
    with pytest.raises(
        UserError, match=r"model.architecture=llama is a llama, for which transformers has no head for masked"
    ):
        task.build_model(ModelConfig(architecture="llama"), facts)
    with pytest.raises(UserError, match="bert has is_decoder=true, with which a token sees none that follow"):
        task.build_model(ModelConfig(architecture="bert", config={"is_decoder": True}), facts)


def test_shares_of_what_is_hidden(facts: SampleFacts, rows: np.ndarray) -> None:
    many = np.tile(rows, (60, 1))
    batch = MaskedLanguageModelling(facts, seed=3).make_batch(packed_rows(many), torch.arange(len(many)), training=True)
    tokens = torch.from_numpy(many[:, :-1])
    is_target = batch["labels"] != -100
    assert torch.equal(batch["labels"][is_target], tokens[is_target])
    assert torch.equal(batch["input_ids"][~is_target], tokens[~is_target])
    assert not is_target[tokens == facts.eos_token_id].any()
    num_targets = int(is_target.sum())
    # Three standard deviations.
    assert num_targets / is_target.numel() == pytest.approx(
        0.15 * (1 - 1 / _LENGTH), abs=3 * 0.36 / tokens.numel() ** 0.5
    )
    inputs = batch["input_ids"][is_target]
    is_masked, is_left = inputs == MASK_ID, inputs == tokens[is_target]
    assert float(is_masked.float().mean()) == pytest.approx(0.8, abs=3 * 0.4 / num_targets**0.5)
    assert float(is_left.float().mean()) == pytest.approx(0.1, abs=3 * 0.31 / num_targets**0.5)
    others = inputs[~is_masked & ~is_left]
    assert others.min() > MASK_ID
    assert len(others.unique()) > 0.8 * len(range(MASK_ID, facts.vocab_size or 0))


def test_a_mask_belongs_to_seed_and_position(facts: SampleFacts, rows: np.ndarray) -> None:
    def hidden(positions: list[int], seed: int = 3, *, training: bool = True) -> torch.Tensor:
        samples = packed_rows(np.tile(rows[:1], (len(positions), 1)))
        task = MaskedLanguageModelling(facts, seed)
        torch.manual_seed(len(positions))
        return task.make_batch(samples, torch.tensor(positions), training)["input_ids"]

    first = hidden([0, 1, 2, 3])
    assert torch.equal(hidden([2, 0]), first[[2, 0]])
    assert len({tuple(row) for row in hidden([0, 1, 2, 3, 10**12]).tolist()}) == 5
    assert not torch.equal(hidden([0], seed=4), first[:1])
    evaluated = hidden([0], training=False)
    assert not torch.equal(evaluated, first[:1])
    assert torch.equal(evaluated, hidden([0], training=False))
    # Nothing is drawn from the generators of torch, so that an evaluation need not go row by row.
    assert torch.get_rng_state().equal(torch.manual_seed(1).get_state())


def test_rows_that_fill_up_and_what_a_row_lacks(facts: SampleFacts, rows: np.ndarray) -> None:
    samples = packed_rows(rows[:3].copy(), np.array([_LENGTH + 1, 20, _LENGTH]))
    batch = MaskedLanguageModelling(facts).make_batch(samples, torch.tensor([5, 6, FILLER]), training=False)
    assert batch["attention_mask"].sum(dim=1).tolist() == [_LENGTH, 20, _LENGTH]
    assert (batch["input_ids"][1, 20:] == PADDING_ID).all()
    assert (batch["labels"][1, 20:] == -100).all()
    assert (batch["labels"][2] == -100).all()
    whole = MaskedLanguageModelling(facts).make_batch(packed_rows(rows[:1].copy()), torch.tensor([5]), training=False)
    assert torch.equal(whole["labels"], batch["labels"][:1])
    assert "attention_mask" not in whole


def test_words_are_those_of_the_tokenizer(
    facts: SampleFacts, tokenizer: PreTrainedTokenizerFast, rows: np.ndarray
) -> None:
    table = word_table(tokenizer, len(tokenizer))
    encoding = tokenizer.backend_tokenizer.encode(_TEXT)
    expected = np.diff(np.array(encoding.word_ids)) != 0
    found = np.diff(table.word_numbers(np.array([encoding.ids]))[0]) != 0
    # Tokens of white space alone may be words of their own.
    spaces = np.array([tokenizer.decode([i]).isspace() for i in encoding.ids[1:]])
    # The pattern of GPT-2 takes the first two characters of 'the for an ending, as of don't.
    assert np.flatnonzero((found != expected)[~spaces]).size == 2 * _TEXT.count("'th")
    assert (~found).sum() > 1000
    batch = MaskedLanguageModelling(facts, whole_word=True, mask_probability=0.3).make_batch(
        packed_rows(rows.copy()), torch.arange(len(rows)), training=True
    )
    is_target = (batch["labels"] != -100).numpy()
    tokens = rows[:, :-1]
    same_word = np.diff(table.word_numbers(tokens), axis=1) == 0
    assert same_word.sum() > 500
    assert (is_target[:, 1:] == is_target[:, :-1])[same_word].all()
    assert is_target.mean() == pytest.approx(0.3, abs=0.03)


def test_tokenizers_of_encoders(tmp_path: Path) -> None:
    words = ["[UNK]", "[PAD]", "[MASK]", "[SEP]", "wor", "##d", "##s", "."]
    encoder = Tokenizer(WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    encoder.pre_tokenizer, encoder.decoder = BertPreTokenizer(), decoders.WordPiece()
    roles = {"unk_token": "[UNK]", "pad_token": "[PAD]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=encoder, **roles).save_pretrained(tmp_path / "plain")
    masking = PreTrainedTokenizerFast(tokenizer_object=encoder, mask_token="[MASK]", **roles)
    masking.save_pretrained(tmp_path / "masks")
    with pytest.raises(UserError, match=r"has no mask token, by which task.name=masked-lm hides"):
        load_tokenizer(str(tmp_path / "plain"), masks=True)
    with pytest.raises(UserError, match="has no end-of-text token"):
        load_tokenizer(str(tmp_path / "masks"))
    tokenizer = load_tokenizer(str(tmp_path / "masks"), masks=True)
    assert (tokenizer.eos_token, tokenizer.mask_token_id) == ("[SEP]", 2)
    table = word_table(tokenizer, len(words))
    assert [words[i] for i in np.flatnonzero(table.is_text)] == ["wor", "##d", "##s", "."]
    numbers = table.word_numbers(np.array([[5, 4, 5, 6, 4, 7, 7, 3, 4]]))
    assert numbers.tolist() == [[0, 1, 1, 1, 2, 3, 4, 5, 6]]


def _settings(strategy: str, backend: str = "torch", micro_size: int = 3) -> dict[str, Any]:
    return {
        "task": {"name": "masked-lm", "whole_word": True},
        "model": _BERT,
        "batch": {"micro_size": micro_size},
        "parallel": {"strategy": strategy, "backend": backend},
        "evaluation": {"every_steps": 3},
    }


_LAYOUTS = (("ddp", "torch"), ("zero2", "torch"), ("zero3", "torch"), ("zero3", "bucketed"), ("zero2", "deepspeed"))


def _train(ranks: Ranks, root: Path, corpus: Path) -> None:
    runs = RunsInProcess(ranks, root / str(ranks.world_size), corpus)
    runs.root.mkdir(exist_ok=True)
    if ranks.world_size != 2:
        runs.train("run", steps=6, **_settings("none" if ranks.world_size == 1 else "ddp", micro_size=2))
        return
    for strategy, backend in _LAYOUTS:
        runs.train(f"{backend}-{strategy}", steps=6, **_settings(strategy, backend))
    runs.train("halves", steps=6, stop_at=4, **_settings("zero2"))
    runs.train("halves", steps=6, **_settings("zero2"))
    # Of a stream positions are counted too.
    streamed = _settings("ddp") | {"data": {"streaming": True, "shuffle_window": 8, "sample_documents": 24}}
    runs.train("streamed", steps=4, **streamed)
    runs.train("streamed-halves", steps=4, stop_at=3, **streamed)
    runs.train("streamed-halves", steps=4, **streamed)


def test_any_layout_trains_what_one_process_does(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    for num_ranks in (1, 2, 3):
        (tmp_path / str(num_ranks)).mkdir()
        run_on_ranks(_train, num_ranks, tmp_path, corpus)
    runs = tmp_path / "2" / "runs"
    expected = computed_lines(RunFolder(tmp_path / "1" / "runs" / "run"))
    assert [line["step"] for line in expected] == [1, 2, 3, 4, 5, 6]
    assert {"eval/loss", "eval/perplexity", "eval/accuracy"} <= expected[-1].keys()
    names = [f"{backend}-{strategy}" for strategy, backend in _LAYOUTS]
    for folder in [tmp_path / "3" / "runs" / "run", *(runs / name for name in names)]:
        for line, wanted in zip(computed_lines(RunFolder(folder)), expected, strict=True):
            assert line == pytest.approx(wanted, rel=2e-5), folder
    assert computed_lines(RunFolder(runs / "halves")) == computed_lines(RunFolder(runs / "torch-zero2"))
    assert computed_lines(RunFolder(runs / "streamed-halves")) == computed_lines(RunFolder(runs / "streamed"))
    continued = shardline("generate", runs / "torch-zero2", "--prompt", "import")
    assert f"{runs / 'torch-zero2'} holds a BertForMaskedLM, which does not continue text" in continued.stderr
    # The masks are those of the run.
    evaluated = shardline("evaluate", runs / "torch-zero2", "--json")
    assert evaluated.returncode == 0, evaluated.stderr
    metrics = json.loads(evaluated.stdout)["metrics"]
    last = computed_lines(RunFolder(runs / "torch-zero2"))[-1]
    assert metrics == pytest.approx(
        {name: last[f"eval/{name}"] for name in ("loss", "perplexity", "accuracy")}, rel=1e-5
    )
    exported = tmp_path / "exported"
    export_model(CheckpointReader(RunFolder(runs / "torch-zero3").checkpoint_path(6)), exported)
    model, tokenizer = AutoModelForMaskedLM.from_pretrained(exported), AutoTokenizer.from_pretrained(exported)
    assert (model.config.pad_token_id, tokenizer.mask_token) == (PADDING_ID, "[MASK]")
    hidden = tokenizer("import [MASK]", return_tensors="pt")
    assert MASK_ID in hidden.input_ids
    assert model(input_ids=hidden.input_ids).logits.isfinite().all()
