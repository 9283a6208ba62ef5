"""Documents that are tokens already: Parquet columns, and Megatron's pairs of files."""

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sharding.ranks.errors import UserError
from tests.support import write_corpus
from trainer.config import parse_config
from trainer.config.data import DataConfig
from trainer.data.packed import packed_samples
from trainer.data.prepare import prepare_corpus
from trainer.data.prepared import PreparedCorpus
from trainer.data.token_files import read_tokens


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> PreparedCorpus:
    """A corpus of texts, for its tokenizer and its tokens."""
    root = tmp_path_factory.mktemp("texts")
    corpus = write_corpus(root / "corpus", 12)
    data = {"source": "text", "paths": [str(corpus)], "vocab_size": 300, "cache_dir": str(root / "cache")}
    prepared = prepare_corpus(_config(**data, validation_fraction=0.0), progress=False)
    assert isinstance(prepared, PreparedCorpus)
    return prepared


def _config(**data: Any) -> DataConfig:
    return parse_config({"steps": 1, "model": {"architecture": "llama"}, "data": data}, "test").data


def _documents(corpus: PreparedCorpus) -> list[list[int]]:
    stream = corpus.stream("train")
    spans = stream.documents_between(0, stream.num_tokens)
    return [stream.read(span.start, span.stop).tolist() for span in spans]


def _write_megatron(path: Path, documents: list[list[list[int]]], code: int = 8) -> Path:
    """Write a pair of files, each document being sequences, as Megatron-LM's ``IndexedDatasetBuilder`` does."""
    dtype = {8: "<u2", 4: "<i4"}[code]
    sequences = [np.array(sequence, dtype) for document in documents for sequence in document]
    path.write_bytes(b"".join(sequence.tobytes() for sequence in sequences))
    lengths = np.array([len(sequence) for sequence in sequences], "<i4")
    pointers = np.cumsum([0, *(sequence.nbytes for sequence in sequences)])[:-1].astype("<i8")
    starts = np.cumsum([0, *map(len, documents)]).astype("<i8")
    header = struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, code, len(sequences), len(starts))
    path.with_suffix(".idx").write_bytes(header + lengths.tobytes() + pointers.tobytes() + starts.tobytes())
    return path


def _prepared(trained: PreparedCorpus, cache: Path, path: Path, **data: Any) -> PreparedCorpus:
    named = {"source": "tokens", "paths": [str(path)], "tokenizer": str(trained.tokenizer_dir), "cache_dir": str(cache)}
    prepared = prepare_corpus(_config(**named, **{"validation_fraction": 0.0} | data), progress=False)
    assert isinstance(prepared, PreparedCorpus)
    return prepared


def test_tokens_are_packed_as_the_texts_that_they_are_of(trained: PreparedCorpus, tmp_path: Path) -> None:
    documents = _documents(trained)
    assert len(documents) == 12
    # With and without the token that ends a document.
    without_end = [document[:-1] for document in documents]
    pq.write_table(pa.table({"input_ids": without_end}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"ids": documents}), tmp_path / "b.parquet")
    halves = [[document[:5], document[5:]] for document in documents]
    corpora = [
        _prepared(trained, tmp_path, tmp_path / "a.parquet"),
        _prepared(trained, tmp_path, tmp_path / "b.parquet", tokens_field="ids"),
        _prepared(trained, tmp_path, _write_megatron(tmp_path / "c.bin", halves)),
        _prepared(trained, tmp_path, _write_megatron(tmp_path / "d.bin", [[d] for d in without_end], code=4)),
    ]
    expected = trained.manifest.splits["train"].shards[0].sha256
    assert [corpus.manifest.splits["train"].shards[0].sha256 for corpus in corpora] == [expected] * 4
    config = _config(source="text", paths=["x"], sequence_length=32)
    rows = packed_samples(corpora[2], config).read("train", [0, 3])
    assert rows["tokens"].equal(packed_samples(trained, config).read("train", [0, 3])["tokens"])


def test_documents_are_found_by_their_place(tmp_path: Path) -> None:
    path = _write_megatron(tmp_path / "a.bin", [[[1, 2], [3]], [], [[4, 5, 6]]])
    assert [(ids.tolist(), place) for ids, place in read_tokens(path, "")] == [
        ([1, 2, 3], f"{path}#0"),
        ([], f"{path}#1"),
        ([4, 5, 6], f"{path}#2"),
    ]


def test_equal_documents_are_dropped_and_some_held_out(trained: PreparedCorpus, tmp_path: Path) -> None:
    documents = [[i, i + 1, i + 2] for i in range(1, 101)]
    path = _write_megatron(tmp_path / "a.bin", [[d] for d in [*documents, *documents[:7], []]])
    manifest = _prepared(trained, tmp_path, path, validation_fraction=0.3).manifest
    assert (manifest.num_documents_read, manifest.num_duplicates, manifest.num_empty) == (108, 7, 1)
    assert 10 < manifest.splits["validation"].num_documents < 50


def test_what_tokens_must_be(trained: PreparedCorpus, tmp_path: Path) -> None:
    def refused(path: Path, sentence: str, **data: Any) -> None:
        with pytest.raises(UserError, match=sentence):
            _prepared(trained, tmp_path, path, **data)

    refused(
        _write_megatron(tmp_path / "a.bin", [[[1, 5000]]]),
        r"a.bin#0 has the token id 5000, but data.tokenizer has ids below 300",
    )
    pq.write_table(pa.table({"ids": [[1]]}), tmp_path / "b.parquet")
    refused(tmp_path / "b.parquet", r"data.tokens_field=input_ids is not a column of .*b.parquet, which has ids")
    pq.write_table(pa.table({"input_ids": ["text"]}), tmp_path / "c.parquet")
    refused(tmp_path / "c.parquet", r"row 0 of .*c.parquet is no list of token ids")
    path = _write_megatron(tmp_path / "d.bin", [[[1, 2, 3]]])
    path.write_bytes(path.read_bytes()[:-2])
    refused(path, r"d.bin has 4 bytes, but its .idx speaks of 6")
    path.with_suffix(".idx").write_bytes(b"something else, of many bytes and more")
    refused(path, r"d.idx is no index of Megatron's")
    path.with_suffix(".idx").unlink()
    refused(path, r"d.idx, which says what is in the .bin, cannot be read: No such file")
    with pytest.raises(
        UserError, match=r"data.source=tokens has tokens and no text, which data.tokenizer=train-bpe needs"
    ):
        _config(source="tokens", paths=["x"])
