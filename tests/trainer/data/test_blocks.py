"""Blocks of token files: what was prepared is what is trained on, or the run ends with a sentence."""

import re
from pathlib import Path

import numpy as np
import pytest

from benchmarks.data.__main__ import make_stream
from sharding.ranks.errors import UserError
from trainer.data.blocks import BLOCK_BYTES
from trainer.data.facts import SampleFacts
from trainer.data.loader import BatchLoader
from trainer.data.order import SampleOrder
from trainer.data.packed import PackedSamples
from trainer.data.shards import TokenStream

_SHARD_TOKENS = 40_000
_BLOCK_TOKENS = BLOCK_BYTES // 2


def _flip(file: Path, position: int) -> None:
    contents = bytearray(file.read_bytes())
    contents[position] ^= 1
    file.write_bytes(contents)


@pytest.fixture
def stream(tmp_path: Path) -> TokenStream:
    """100,000 tokens in three shards, of two, two and one block."""
    return make_stream(tmp_path, 100_000, _SHARD_TOKENS)


def test_a_changed_block_is_named_with_its_shard_and_documents(stream: TokenStream, tmp_path: Path) -> None:
    _flip(tmp_path / "train-00001.bin", BLOCK_BYTES + 11)
    # The first block of that shard, and what lies before it, are as they were.
    stream.read(0, _SHARD_TOKENS + _BLOCK_TOKENS)
    first, last = (_SHARD_TOKENS + _BLOCK_TOKENS) // 1000, 2 * _SHARD_TOKENS // 1000 - 1
    sentence = f"train-00001.bin has changed .* in block 1 .*documents {first} .* to {last} .*delete the folder"
    with pytest.raises(UserError, match=sentence):
        stream.read(_SHARD_TOKENS + _BLOCK_TOKENS - 1, _SHARD_TOKENS + _BLOCK_TOKENS + 1)
    with pytest.raises(UserError, match=sentence):
        stream.read(100, 99_999)


def test_the_error_reaches_whoever_takes_batches(stream: TokenStream, tmp_path: Path) -> None:
    _flip(tmp_path / "train-00002.bin", 39_999)
    order = SampleOrder(0, stream.num_samples(100), shuffle=False)
    samples = PackedSamples(lambda _: stream, SampleFacts(100))
    loader = BatchLoader(samples, order, global_size=100, micro_size=100, dp_rank=0, dp_degree=1)
    for _ in range(7):
        loader.next_step()
    with pytest.raises(UserError, match=r"train-00002\.bin has changed"):
        loader.next_step()
    loader.close()


def test_a_stream_that_is_not_verified_reads_what_is_there(stream: TokenStream, tmp_path: Path) -> None:
    whole = stream.read(0, 100_000)
    _flip(tmp_path / "train-00000.bin", 4)
    trusting = TokenStream(tmp_path, stream._split, "<u2", verify=False)
    assert np.flatnonzero(trusting.read(0, 100_000) != whole).tolist() == [2]


@pytest.mark.parametrize("file", ["documents.i64", "source-offsets.i64"])
def test_a_corrupt_list_of_documents_is_found_when_it_is_used(stream: TokenStream, tmp_path: Path, file: str) -> None:
    _flip(tmp_path / f"train-{file}", 801)
    stream.read(0, 1000)
    with pytest.raises(UserError, match=re.escape(f"train-{file} does not have the SHA-256")):
        stream.documents_between(0, 10)
    # Then the documents of a changed block cannot be named, and that is said.
    _flip(tmp_path / "train-00001.bin", 0)
    with pytest.raises(UserError, match="documents that cannot be named"):
        stream.read(_SHARD_TOKENS, _SHARD_TOKENS + 1)


def test_corrupt_hashes_are_not_taken_for_corrupt_tokens(stream: TokenStream, tmp_path: Path) -> None:
    _flip(tmp_path / "train-blocks.sha256", 40)
    with pytest.raises(UserError, match=r"train-blocks\.sha256 does not have the SHA-256"):
        stream.read(0, 10)
