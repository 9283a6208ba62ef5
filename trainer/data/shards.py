"""Packed token shards on disk and the streams that read them."""

import bisect
import contextlib
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from pydantic import Field, model_validator

from sharding.ranks.errors import UserError
from sharding.strict_model import StrictRecord
from trainer.data.blocks import BLOCK_BYTES, HASH_BYTES, BlockCheck
from trainer.data.contents_keys import KEY_BYTES

TARGET_BIT = np.uint32(1 << 31)
"""Set in a stored token of a conversation that is a target."""


class FileFacts(StrictRecord):
    """A file of a prepared corpus."""

    file: str = Field(pattern=r"^[\w-][\w.-]*(/[\w-][\w.-]*)*$")
    """Name in the corpus folder; no part of it begins with a dot."""

    num_bytes: int = Field(ge=0)
    """Size."""

    sha256: str
    """SHA-256 of the contents in hexadecimal digits."""


class SplitFacts(StrictRecord):
    """One split of a prepared corpus."""

    num_tokens: int
    """Tokens, with one that ends each document."""

    num_documents: int
    """Documents."""

    shards: list[FileFacts]
    """Token files in order."""

    documents: FileFacts
    """int64 [documents + 1]: where each document starts in the token stream, and the end."""

    source_offsets: FileFacts
    """int64 [documents + 1]: where each document's source id starts in the file of source ids, and the end."""

    sources: FileFacts
    """Source ids, UTF-8, one behind the other."""

    blocks: FileFacts
    """SHA-256 of each block of the token files, see ``trainer.data.blocks``."""

    keys: FileFacts | None = None
    """Key of each document before it was tokenised, see ``trainer.data.contents_keys``; None in old corpora."""

    unigram_entropy: float | None = None
    """Entropy of a token in nats, by the frequencies of tokens alone; unknown in old corpora, and of no tokens."""

    @property
    def files(self) -> list[FileFacts]:
        """All files."""
        keys = [] if self.keys is None else [self.keys]
        return [*self.shards, self.documents, self.source_offsets, self.sources, self.blocks, *keys]

    @model_validator(mode="after")
    def _sizes_agree(self) -> Self:
        num_blocks = sum(-(-shard.num_bytes // BLOCK_BYTES) for shard in self.shards)
        if self.blocks.num_bytes != num_blocks * HASH_BYTES:
            raise ValueError(f"{self.blocks.file} does not have a hash for each of {num_blocks} blocks")
        for facts in (self.documents, self.source_offsets):
            if facts.num_bytes != 8 * (self.num_documents + 1):
                raise ValueError(f"{facts.file} does not speak of {self.num_documents} documents")
        if self.keys is not None and self.keys.num_bytes % KEY_BYTES:
            raise ValueError(f"{self.keys.file} does not have whole keys")
        return self


@dataclass(frozen=True)
class DocumentSpan:
    """A document's part of a range of tokens; ``start`` and ``stop`` are positions in the stream."""

    document_index: int
    source_id: str
    start: int
    stop: int


class TokenStream:
    """One split's tokens as one long array over memory-mapped shards."""

    def __init__(
        self,
        folder: Path,
        split: SplitFacts,
        dtype: str,
        name: str = "",
        *,
        verify: bool = True,
        has_targets: bool = False,
    ) -> None:
        """Map the shards of one split.

        Args:
            folder: where they are.
            split: what the manifest says of them.
            dtype: NumPy type of a token.
            name: what a mixture calls the source.
            verify: compare what is read with the hashes that were taken when the corpus was prepared.
            has_targets: whether tokens say if they are targets, see ``split_targets``; elsewhere all are.

        Raises:
            UserError: a file is missing or has another size than the manifest says.
        """
        self.num_tokens = split.num_tokens
        self.name = name
        self.has_targets = has_targets
        self._folder = folder
        self._split = split
        check_files(folder, split.files)
        # Plain arrays: a slice of NumPy's own class for mapped files costs more than most copies.
        self._shards = [np.asarray(np.memmap(folder / s.file, dtype=dtype, mode="r")) for s in split.shards]
        self._token_bytes = np.dtype(dtype).itemsize
        self._document_starts = np.memmap(folder / split.documents.file, dtype="<i8", mode="r")
        self._starts = [0]
        for shard in self._shards:
            self._starts.append(self._starts[-1] + len(shard))
        self._blocks = BlockCheck(self._read_block_hashes, self._shards, self._report_block) if verify else None
        # Small beside the tokens, and searched all over: compared as wholes, when they are first used.
        self._unverified = {facts.file for facts in (split.documents, split.source_offsets, split.sources) if verify}

    def num_samples(self, sequence_length: int) -> int:
        """Training samples in the stream."""
        return num_samples(self.num_tokens, sequence_length)

    def locate(self, index: int, sequence_length: int) -> tuple["TokenStream", int]:
        """See StreamUnion; here the stream is all there is."""
        return self, index

    def read_into(self, start: int, stop: int, target: np.ndarray) -> None:
        """Copy tokens [start, stop) as they are stored into an integer array of that length; see ``split_targets``.

        Raises:
            UserError: they are not what was prepared.
        """
        index = bisect.bisect_right(self._starts, start) - 1
        shard_start, shard_stop = self._starts[index], self._starts[index + 1]
        here = min(stop, shard_stop)
        if self._blocks is not None:
            size = self._token_bytes
            self._blocks.compare(index, (start - shard_start) * size, (here - shard_start) * size)
        target[: here - start] = self._shards[index][start - shard_start : here - shard_start]
        if here < stop:
            self.read_into(here, stop, target[here - start :])

    def read(self, start: int, stop: int) -> np.ndarray:
        """Token ids [start, stop) as int64."""
        return self.read_targets(start, stop)[0]

    def read_targets(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids [start, stop) as int64, and whether each is a target, bool."""
        tokens = np.empty(stop - start, dtype=np.int64)
        if len(tokens):
            self.read_into(start, stop, tokens)
        return split_targets(tokens) if self.has_targets else (tokens, np.ones(len(tokens), dtype=bool))

    def document_starts(self, start: int, stop: int) -> np.ndarray:
        """Positions in [start, stop) at which a document starts, int64.

        Raises:
            UserError: they are not what was prepared.
        """
        self._verify(self._split.documents)
        bounds = np.searchsorted(self._document_starts, [start, min(stop, self.num_tokens)])
        return np.asarray(self._document_starts[bounds[0] : bounds[1]])

    def documents_between(self, start: int, stop: int) -> list[DocumentSpan]:
        """The documents, whole or in part, that tokens [start, stop) come from.

        Raises:
            UserError: what is known of them is not what was prepared.
        """
        for facts in (self._split.documents, self._split.source_offsets, self._split.sources):
            self._verify(facts)
        starts = self._document_starts
        offsets = np.memmap(self._folder / self._split.source_offsets.file, dtype="<i8", mode="r")
        first = int(np.searchsorted(starts, start, side="right")) - 1
        spans = []
        with (self._folder / self._split.sources.file).open("rb") as sources:
            for index in range(first, self._split.num_documents):
                if starts[index] >= stop:
                    break
                sources.seek(int(offsets[index]))
                source_id = sources.read(int(offsets[index + 1] - offsets[index])).decode()
                begin, end = max(start, int(starts[index])), min(stop, int(starts[index + 1]))
                spans.append(DocumentSpan(index, source_id, begin, end))
        return spans

    def _verify(self, facts: FileFacts) -> None:
        """Compare a whole file with the manifest when it is first used."""
        if facts.file in self._unverified:
            hash_files(self._folder, [facts])
            self._unverified.remove(facts.file)

    def _read_block_hashes(self) -> memoryview:
        hash_files(self._folder, [self._split.blocks])
        # Mapped: of 10^12 tokens they are a gigabyte, which the ranks of a machine share so.
        return np.asarray(np.memmap(self._folder / self._split.blocks.file, dtype=np.uint8, mode="r")).data

    def _report_block(self, shard: int, start: int, stop: int) -> None:
        """Say which block of a shard has changed, and which documents are in it.

        Raises:
            UserError: always.
        """
        size = self._token_bytes
        documents = "documents that cannot be named, since the list of them is corrupt too"
        with contextlib.suppress(UserError, ValueError):
            spans = self.documents_between(self._starts[shard] + start // size, self._starts[shard] + stop // size)
            first, last = spans[0], spans[-1]
            documents = f"document {first.document_index} ({first.source_id})"
            if len(spans) > 1:
                documents = (
                    f"documents {first.document_index} ({first.source_id}) to {last.document_index} ({last.source_id})"
                )
        raise UserError(
            f"prepared corpus {self._folder} is corrupt: {self._split.shards[shard].file} has changed since it was "
            f"prepared, in block {start // BLOCK_BYTES} (bytes {start} to {stop}), which holds {documents}; delete the "
            "folder, and the same command prepares it again and goes on."
        )


class StreamUnion:
    """The streams of several sources side by side: a sample of all has one index, and lies in one of them."""

    def __init__(self, streams: Sequence[TokenStream]) -> None:
        """Put streams side by side, in this order."""
        self._streams = tuple(streams)
        self.has_targets = any(stream.has_targets for stream in streams)

    def num_samples(self, sequence_length: int) -> int:
        """Training samples in all streams."""
        return sum(stream.num_samples(sequence_length) for stream in self._streams)

    def locate(self, index: int, sequence_length: int) -> tuple[TokenStream, int]:
        """The stream that holds a sample, and the sample's index in it."""
        for stream in self._streams:
            num_here = stream.num_samples(sequence_length)
            if index < num_here:
                return stream, index
            index -= num_here
        raise IndexError("there is no such sample")


Stream = TokenStream | StreamUnion


def split_targets(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Stored tokens of conversations as token ids, of the same integer type, and whether each is a target, bool."""
    return tokens & ~tokens.dtype.type(TARGET_BIT), (tokens & tokens.dtype.type(TARGET_BIT)) != 0


def num_samples(num_tokens: int, sequence_length: int) -> int:
    """Training samples in a stream: sample i covers tokens [i*S, i*S + S], and the last may be short."""
    return max(0, -(-(num_tokens - 1) // sequence_length))


def check_files(folder: Path, files: list[FileFacts]) -> None:
    """Compare sizes with the manifest.

    Raises:
        UserError: a file is missing, truncated or too long.
    """
    for facts in files:
        try:
            num_bytes = (folder / facts.file).stat().st_size
        except OSError:
            num_bytes = 0
        if num_bytes != facts.num_bytes or not (folder / facts.file).is_file():
            raise _corrupt(folder, f"{facts.file} has {num_bytes} bytes instead of {facts.num_bytes}")


def hash_files(folder: Path, files: list[FileFacts]) -> None:
    """Compare contents with the manifest.

    Raises:
        UserError: a file's contents have changed.
    """
    for facts in files:
        try:
            with (folder / facts.file).open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise _corrupt(folder, f"{facts.file} cannot be read ({error.strerror})") from None
        if digest != facts.sha256:
            raise _corrupt(folder, f"{facts.file} does not have the SHA-256 of the manifest")


def _corrupt(folder: Path, reason: str) -> UserError:
    return UserError(
        f"prepared corpus {folder} is corrupt: {reason}; delete the folder, and the same command prepares it again."
    )
