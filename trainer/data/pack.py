"""Packing: the documents of a split as one stream of tokens in shard files."""

import hashlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sharding.ranks.errors import UserError
from trainer.data.blocks import hash_blocks
from trainer.data.clean import CleanedCorpus
from trainer.data.progress import StageProgress
from trainer.data.shards import FileFacts, SplitFacts, split_targets
from trainer.data.tokenizer import text_encoder, vocabulary_size

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_BATCH_DOCUMENTS = 256


def pack_split(
    name: str,
    cleaned: CleanedCorpus,
    tokenizer: "PreTrainedTokenizerFast",
    dtype: str,
    shard_tokens: int,
    folder: Path,
    stages: StageProgress,
) -> SplitFacts:
    """Tokenise one split and write its shards.

    Args:
        name: `train` or `validation`.
        cleaned: the documents.
        tokenizer: ends each document with its end-of-text token.
        dtype: NumPy type of a stored token.
        shard_tokens: tokens of a full shard.
        folder: where the files go.
        stages: shows progress.
    """
    writer = ShardWriter(folder, name, dtype, shard_tokens)
    encode = _token_reader(tokenizer) if cleaned.has_tokens else _batch_encoder(tokenizer)
    starts, sources = [0], []
    with stages.stage(f"tokenising {name}", cleaned.num_documents(name)) as advance:
        documents = cleaned.contents(name)
        while batch := list(itertools.islice(documents, _BATCH_DOCUMENTS)):
            for ids in encode(batch):
                writer.write(ids.astype(dtype))
                starts.append(writer.num_tokens)
            sources += [source_id.encode() for _, source_id in batch]
            advance(len(batch))
    return writer.close(starts, sources)


_Encode = Callable[[list[tuple[bytes, str]]], Iterator[np.ndarray]]


def _batch_encoder(tokenizer: "PreTrainedTokenizerFast") -> _Encode:
    """Turns texts into tokens, each with one that ends it."""
    encoder = text_encoder(tokenizer)

    def encode(batch: list[tuple[bytes, str]]) -> Iterator[np.ndarray]:
        # The library encodes a batch on all its threads.
        texts = [text.decode() for text, _ in batch]
        for encoding in encoder.encode_batch_fast(texts, add_special_tokens=False):
            yield np.array([*encoding.ids, tokenizer.eos_token_id])

    return encode


def _token_reader(tokenizer: "PreTrainedTokenizerFast") -> _Encode:
    """Gives tokens back that were made before, each document with one that ends it."""
    vocab_size = vocabulary_size(tokenizer)

    def read(batch: list[tuple[bytes, str]]) -> Iterator[np.ndarray]:
        for contents, source_id in batch:
            ids = np.frombuffer(contents, dtype="<u4")
            if ids.max() >= vocab_size:
                raise UserError(
                    f"data.paths: {source_id} has the token id {ids.max()}, but data.tokenizer has ids below "
                    f"{vocab_size}; name the tokenizer that has made the tokens."
                )
            yield ids if ids[-1] == tokenizer.eos_token_id else np.append(ids, np.uint32(tokenizer.eos_token_id))

    return read


class ShardWriter:
    """Cuts a stream of tokens into files of equal size, hashing as it goes.

    Attributes:
        num_tokens: written so far.
    """

    def __init__(self, folder: Path, name: str, dtype: str, shard_tokens: int, *, has_targets: bool = False) -> None:
        """Begin a split.

        Args:
            folder: where the files go.
            name: `train` or `validation`.
            dtype: NumPy type of a stored token.
            shard_tokens: tokens of a full shard.
            has_targets: whether tokens say if they are targets, see ``TARGET_BIT``; then these alone are counted.
        """
        self.num_tokens = 0
        self._block_hashes = b""
        self._counts = np.zeros(0, dtype=np.int64)
        self._has_targets = has_targets
        self._folder = folder
        self._name = name
        self._dtype = dtype
        self._shard_bytes = shard_tokens * np.dtype(dtype).itemsize
        self._shards: list[FileFacts] = []
        self._pending = bytearray()

    def write(self, tokens: np.ndarray) -> None:
        """Add tokens, of the stored type."""
        self.num_tokens += len(tokens)
        self._pending += tokens.tobytes()
        while len(self._pending) >= self._shard_bytes:
            self._flush(self._shard_bytes)

    def close(self, starts: list[int], sources: list[bytes]) -> SplitFacts:
        """Write what is left, and the documents.

        Args:
            starts: where each document starts, and the end.
            sources: where each came from.
        """
        if self._pending:
            self._flush(len(self._pending))
        folder, name = self._folder, self._name
        source_offsets = np.cumsum([0, *(len(source) for source in sources)])
        return SplitFacts(
            num_tokens=self.num_tokens,
            num_documents=len(sources),
            shards=self._shards,
            documents=write_file(folder / f"{name}-documents.i64", np.array(starts, dtype="<i8").tobytes()),
            source_offsets=write_file(folder / f"{name}-source-offsets.i64", source_offsets.astype("<i8").tobytes()),
            sources=write_file(folder / f"{name}-sources.txt", b"".join(sources)),
            blocks=write_file(folder / f"{name}-blocks.sha256", self._block_hashes),
            unigram_entropy=_entropy(self._counts),
        )

    def _flush(self, num_bytes: int) -> None:
        path = self._folder / f"{self._name}-{len(self._shards):05d}.bin"
        contents = bytes(self._pending[:num_bytes])
        self._shards.append(write_file(path, contents))
        self._block_hashes += hash_blocks(contents)
        tokens = np.frombuffer(contents, dtype=self._dtype)
        if self._has_targets:
            ids, is_target = split_targets(tokens)
            tokens = ids[is_target]
        counts = np.bincount(tokens, minlength=len(self._counts))
        counts[: len(self._counts)] += self._counts
        self._counts = counts
        del self._pending[:num_bytes]


def _entropy(counts: np.ndarray) -> float | None:
    """Entropy in nats of drawing one of what was counted; None where nothing was."""
    total = counts.sum()
    shares = counts[counts > 0] / total if total else counts
    return float(-(shares * np.log(shares)).sum()) if total else None


def write_file(path: Path, contents: bytes) -> FileFacts:
    """Write a file of a corpus and describe it."""
    path.write_bytes(contents)
    return _facts(path.name, contents)


def describe_file(path: Path, folder: Path) -> FileFacts:
    """Describe a file that somebody else has written below a corpus folder."""
    return _facts(str(path.relative_to(folder)), path.read_bytes())


def _facts(name: str, contents: bytes) -> FileFacts:
    return FileFacts(file=name, num_bytes=len(contents), sha256=hashlib.sha256(contents).hexdigest())
