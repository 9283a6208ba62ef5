"""Cleaning: normalised documents without empty ones and exact duplicates, divided into splits."""

import hashlib
import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from sharding.ranks.errors import UserError
from trainer.config.data import DataConfig, SourceConfig
from trainer.data.contents_keys import KEY_BYTES
from trainer.data.conversations import in_all_texts, said
from trainer.data.corpus import clean_text, read_documents
from trainer.data.progress import StageProgress

_SPOOL_NAME = "documents.spool"


@dataclass
class CleanedCorpus:
    """Cleaned documents, kept in a file, with their splits.

    Attributes:
        spool: UTF-8 texts, or tokens as ``<u4``, one behind the other.
        lengths: bytes of each.
        source_ids: where each came from.
        keys: by which each is known elsewhere, see ``trainer.data.contents_keys``.
        is_validation: which of them are held out.
        validation_limit: those whose ``hash_position`` is below it.
        sha256: of all texts and their lengths.
        num_read: documents in the source.
        num_empty: of these, dropped for being empty.
        num_duplicates: of these, dropped for being equal to an earlier one.
        empty_files: files of the source without a single row.
        has_tokens: whether documents are tokens already.
        has_messages: whether documents are conversations in JSON.
    """

    spool: Path
    lengths: list[int] = field(default_factory=list)
    source_ids: list[str] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    is_validation: list[bool] = field(default_factory=list)
    validation_limit: float = 0.0
    sha256: str = ""
    num_read: int = 0
    num_empty: int = 0
    num_duplicates: int = 0
    empty_files: list[Path] = field(default_factory=list)
    has_tokens: bool = False
    has_messages: bool = False

    def num_documents(self, split: str) -> int:
        """Documents of one split."""
        num_held_out = sum(self.is_validation)
        return num_held_out if split == "validation" else len(self.lengths) - num_held_out

    def documents(self, split: str) -> Iterator[tuple[str, str]]:
        """Text and source id of each document of one split, in source order."""
        return ((contents.decode(), source_id) for contents, source_id in self.contents(split))

    def contents(self, split: str) -> Iterator[tuple[bytes, str]]:
        """Bytes and source id of each document of one split, in source order."""
        with self.spool.open("rb") as file:
            for length, source_id, held_out in zip(self.lengths, self.source_ids, self.is_validation, strict=True):
                contents = file.read(length)
                if held_out == (split == "validation"):
                    yield contents, source_id

    def keys_of(self, split: str) -> bytes:
        """Keys of the documents of one split, in source order, one behind the other."""
        is_here = [held_out == (split == "validation") for held_out in self.is_validation]
        return b"".join(itertools.compress(self.keys, is_here))

    def texts(self, split: str) -> Iterator[str]:
        """The texts alone, of conversations what is said in them."""
        texts = (text for text, _ in self.documents(split))
        return map(said, texts) if self.has_messages else texts

    def remove_spool(self) -> None:
        """Delete the file of texts."""
        self.spool.unlink()


def clean_corpus(source: SourceConfig, config: DataConfig, work: Path, stages: StageProgress) -> CleanedCorpus:
    """Read, clean and divide the documents of a source; texts go to a file, so memory holds only their lengths.

    A document is held out where a hash of its text falls below ``data.validation_fraction``: the division depends on
    the text alone, so adding documents moves none from one side to the other.

    Raises:
        UserError: the source cannot be read, or nothing is left to train on.
    """
    cleaned = CleanedCorpus(
        work / _SPOOL_NAME, has_tokens=source.source == "tokens", has_messages=source.reads_messages
    )
    seen: set[bytes] = set()
    hash_positions: list[float] = []
    digest = hashlib.sha256()
    with cleaned.spool.open("wb") as spool, stages.stage("reading documents") as advance:
        for document in read_documents(source, cleaned.empty_files.append):
            cleaned.num_read += 1
            advance(1)
            identity = None
            if source.reads_messages:
                is_empty = False
                text, identity = encode_conversation(document.text, config.normalize)
            elif document.tokens is None:
                text = encode_text(document.text, config.normalize)
                is_empty = not text.strip()
            else:
                text, is_empty = document.tokens.astype("<u4").tobytes(), not len(document.tokens)
            if is_empty:
                cleaned.num_empty += 1
                continue
            key = hashlib.sha256(identity or text).digest()
            if key in seen:
                cleaned.num_duplicates += 1
                continue
            seen.add(key)
            spool.write(text)
            digest.update(len(text).to_bytes(8, "little") + key)
            cleaned.lengths.append(len(text))
            cleaned.source_ids.append(document.source_id)
            cleaned.keys.append(key[:KEY_BYTES])
            group = document.group.encode()
            hash_positions.append(hash_position(hashlib.sha256(group).digest() if group else key))
    cleaned.sha256 = digest.hexdigest()
    if not cleaned.lengths:
        raise UserError(
            f"data.source={source.source}: the corpus is empty ({cleaned.num_read} documents read, "
            f"{cleaned.num_empty} of them empty); check data.paths and data.text_field."
        )
    cleaned.validation_limit = _validation_limit(hash_positions, config.validation_fraction)
    cleaned.is_validation = [position < cleaned.validation_limit for position in hash_positions]
    return cleaned


def encode_text(text: str, normalize: str) -> bytes:
    """A document's cleaned text in UTF-8."""
    # A lone surrogate cannot be stored as UTF-8; JSON can bring one in.
    return clean_text(text, normalize).encode("utf-8", errors="replace")


def encode_conversation(conversation: str, normalize: str) -> tuple[bytes, bytes]:
    """A conversation in JSON with all its texts cleaned, in UTF-8; and the same in any order of its fields."""
    cleaned = in_all_texts(json.loads(conversation), lambda text: clean_text(text, normalize))
    forms = (json.dumps(cleaned, ensure_ascii=False, sort_keys=is_sorted) for is_sorted in (False, True))
    text, identity = (form.encode("utf-8", errors="replace") for form in forms)
    return text, identity


def hash_position(sha256: bytes) -> float:
    """A hash as a number from 0 to 1."""
    return int.from_bytes(sha256[:8], "little") / 2**64


def _validation_limit(hash_positions: list[float], fraction: float) -> float:
    """Documents below it are held out; of two or more, at least one on each side."""
    if fraction > 0 and len(hash_positions) > 1:
        if min(hash_positions) >= fraction:
            return math.nextafter(min(hash_positions), 1.0)
        if max(hash_positions) < fraction:
            return max(hash_positions)
    return fraction
