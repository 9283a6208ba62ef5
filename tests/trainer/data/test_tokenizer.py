"""Tokenizers: documents are text and nothing else, whole, and ids may have gaps."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

from sharding.ranks.errors import UserError
from trainer.config.data import DataConfig
from trainer.data.prepare import prepare_corpus
from trainer.data.prepared import PreparedCorpus, PreparedStream
from trainer.data.streaming import DocumentStream, PackedStream
from trainer.data.tokenizer import (
    HIDDEN,
    control_encoder,
    first_difference,
    load_tokenizer,
    special_tokens,
    text_encoder,
    train_byte_level_bpe,
)

TEXT = "a </s> b <|endoftext|> c [SEP] d <e> e <pad>"


def _byte_level() -> PreTrainedTokenizerFast:
    return train_byte_level_bpe([TEXT, TEXT], 280)


def _unigram() -> PreTrainedTokenizerFast:
    """As those of SentencePiece: control tokens are pieces of the model, with the best score of all."""
    pieces = [
        ("<unk>", 0.0),
        ("</s>", 0.0),
        ("\u2581", -2.0),
        *((letter, -3.0) for letter in sorted(set(TEXT) - {" "})),
    ]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


def _merges_to_a_control_token() -> PreTrainedTokenizerFast:
    vocabulary = {"<": 0, "e": 1, ">": 2, "<e": 3, "<e>": 4, "<e>e": 5}
    vocabulary |= {letter: 6 + i for i, letter in enumerate(sorted(set(TEXT) - {"<", "e", ">"}))}
    merges = [("<", "e"), ("<e", ">"), ("<e>", "e")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<e>")


def _word_pieces() -> PreTrainedTokenizerFast:
    letters = sorted(set(TEXT) - {" "})
    names = ["[UNK]", "[SEP]", *letters, *(f"##{letter}" for letter in letters)]
    vocabulary = {name: i for i, name in enumerate(names)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.WhitespaceSplit(), decoders.WordPiece(cleanup=False)
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 1), ("[UNK]", 0))
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="[SEP]", unk_token="[UNK]")
    # Behind those of the model, and not special: it stays what it is, with its id.
    wrapped.add_tokens([AddedToken("<pad>", special=False)])
    return wrapped


def _behind_those_of_the_model() -> PreTrainedTokenizerFast:
    """As those of most chat models: the tokenizer's own model does not know its control tokens."""
    tokenizer = train_byte_level_bpe([TEXT, TEXT], 280).backend_tokenizer
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", additional_special_tokens=["[SEP]"])


@pytest.mark.parametrize(
    "make", [_byte_level, _unigram, _merges_to_a_control_token, _word_pieces, _behind_those_of_the_model]
)
def test_control_tokens_in_a_text_are_text(make: Any) -> None:
    tokenizer = make()
    encoder = text_encoder(tokenizer)
    ids = encoder.encode_batch_fast([TEXT], add_special_tokens=False)[0].ids
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.eos_token_id in tokenizer.backend_tokenizer.encode(TEXT, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == TEXT.replace(" ", "")
    # Everything else is as before.
    for plain in ("a b c d e", "<pad>"):
        before = tokenizer.backend_tokenizer.encode(plain, add_special_tokens=False)
        assert encoder.encode(plain, add_special_tokens=False).ids == before.ids


@pytest.mark.parametrize(
    "make", [_byte_level, _unigram, _merges_to_a_control_token, _word_pieces, _behind_those_of_the_model]
)
def test_control_tokens_that_are_written_are_told_from_those_that_are_said(make: Any) -> None:
    tokenizer = make()
    names = {name for name in special_tokens(tokenizer) if len(name) > 1} - {tokenizer.unk_token}
    encoder = control_encoder(tokenizer, names)
    for name in names:
        ids = encoder.encode(f"a {HIDDEN}{name} b {name} c", add_special_tokens=False).ids
        assert ids.count(tokenizer.convert_tokens_to_ids(name)) == 1
    # Nothing else has another id.
    written = TEXT
    for name in names:
        written = written.replace(name, HIDDEN + name)
    before = tokenizer.backend_tokenizer.encode(TEXT, add_special_tokens=False).ids
    assert encoder.encode(written, add_special_tokens=False).ids == before


def _config(tmp_path: Path, texts: list[str], **settings: Any) -> DataConfig:
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    defaults = {"source": "jsonl", "paths": str(tmp_path / "x.jsonl"), "vocab_size": 300, "validation_fraction": 0.0}
    return DataConfig.model_validate(defaults | {"cache_dir": str(tmp_path / "cache")} | settings)


def _save(tokenizer: PreTrainedTokenizerFast, folder: Path) -> str:
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("is_trained", [True, False])
def test_each_document_has_one_end(tmp_path: Path, is_trained: bool) -> None:
    texts = [f"document {number} <|endoftext|> goes on </s>" for number in range(97)]
    named = {} if is_trained else {"tokenizer": _save(_unigram(), tmp_path / "tokenizer")}
    config = _config(tmp_path, texts, **named)
    corpus = prepare_corpus(config, progress=False)
    assert isinstance(corpus, PreparedCorpus)
    stream = corpus.stream("train")
    tokens = stream.read(0, stream.num_tokens)
    assert int((tokens == corpus.eos_token_id).sum()) == 97
    streamed = prepare_corpus(config.model_copy(update={"streaming": True}), progress=False)
    assert isinstance(streamed, PreparedStream)
    tokenizer = AutoTokenizer.from_pretrained(streamed.tokenizer_dir)
    packed = PackedStream(DocumentStream(config, streamed.validation_limit, 0, 1, None), tokenizer)
    row, _ = packed.next_row(len(tokens) - 1)
    assert np.array_equal(row, tokens)


def test_a_tokenizer_that_cuts_its_inputs_cuts_no_document(tmp_path: Path) -> None:
    tokenizer = _byte_level()
    tokenizer.backend_tokenizer.enable_truncation(5)
    tokenizer.backend_tokenizer.enable_padding(length=64)
    texts = ["a long document of many words, all of which are kept", "short"]
    config = _config(tmp_path, texts, tokenizer=_save(tokenizer, tmp_path / "tokenizer"))
    (corpus,) = prepare_corpus(config, progress=False).corpora
    stream = corpus.stream("train")
    assert tokenizer.decode(stream.read(0, stream.num_tokens).tolist()) == "".join(f"{t}<|endoftext|>" for t in texts)


@pytest.mark.parametrize(("largest", "dtype"), [(400, "<u2"), (65_535, "<u2"), (65_536, "<u4"), (70_000, "<u4")])
def test_ids_may_have_gaps(tmp_path: Path, largest: int, dtype: str) -> None:
    """Fewer tokens than the largest id."""
    description = json.loads(_byte_level().backend_tokenizer.to_str())
    token = max(description["model"]["vocab"], key=description["model"]["vocab"].get)
    description["model"]["vocab"][token] = largest
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(description)), eos_token="<|endoftext|>"
    )
    assert len(tokenizer) < 300
    text = tokenizer.decode([largest])
    config = _config(tmp_path, [f"{text} {text}"], tokenizer=_save(tokenizer, tmp_path / "tokenizer"))
    (corpus,) = prepare_corpus(config, progress=False).corpora
    assert (corpus.vocab_size, corpus.manifest.dtype) == (largest + 1, dtype)
    stream = corpus.stream("train")
    assert largest in stream.read(0, stream.num_tokens).tolist()


@pytest.mark.parametrize("kind", ["gpt2", "t5", "bert", "llama"])
def test_a_model_without_a_tokenizer_has_none(tmp_path: Path, kind: str) -> None:
    """Of some kinds transformers makes one that has nothing in it."""
    AutoConfig.for_model(kind).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"data.tokenizer={tmp_path}( cannot be loaded| has no tokenizer)"):
        load_tokenizer(str(tmp_path))


def test_the_first_difference_is_named() -> None:
    tokens = {"a": 0, "b": 1, "c": 2}
    assert first_difference(tokens, tokens | {"d": 3}) is None
    assert first_difference(tokens, {"a": 0, "c": 1, "b": 2}) == "'b' has id 1 instead of 2"
    assert first_difference(tokens | {"d": 3}, tokens) == "'d' has id 3 and is not there"
