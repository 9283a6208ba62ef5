"""Files of documents that are tokens already: a column of Parquet, or Megatron's ``.bin`` with its ``.idx``."""

import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from sharding.ranks.errors import UserError
from trainer.data.row_files import open_parquet, parquet_rows

INDEX_SUFFIX = ".idx"

# As megatron/core/datasets/indexed_dataset.py of Megatron-LM writes it.
_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_VERSION = 1
_DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}


def read_tokens(path: Path, column: str) -> Iterator[tuple[np.ndarray, str]]:
    """The documents of a file as token ids, int64, and where each came from.

    Args:
        path: a Parquet file, or a ``.bin`` beside its ``.idx``.
        column: of a Parquet file, the one that holds the ids.

    Raises:
        UserError: the file has no such column, or no index that says what is in it.
    """
    documents = _indexed(path) if path.suffix == ".bin" else _of_parquet(path, column)
    for number, (tokens, place) in enumerate(documents):
        if len(tokens) and tokens.min() < 0:
            raise UserError(f"data.paths: {place} has the token id {tokens.min()}, which is below 0; mend the file.")
        yield tokens, f"{path}#{number}"


def _of_parquet(path: Path, column: str) -> Iterator[tuple[np.ndarray, str]]:
    table = open_parquet(path)
    if table is None:
        return
    names = table.schema_arrow.names
    if column not in names:
        raise UserError(
            f"data.tokens_field={column} is not a column of {path}, which has {', '.join(names)}; name one."
        )
    for place, row in parquet_rows(path, [column]):
        ids = [] if row[column] is None else row[column]
        if not isinstance(ids, list) or not all(isinstance(token, int) for token in ids):
            raise UserError(f"data.tokens_field={column}: {place} is no list of token ids; name another column.")
        yield np.array(ids, dtype=np.int64), place


def _indexed(path: Path) -> Iterator[tuple[np.ndarray, str]]:
    dtype, lengths, pointers, starts = _read_index(path.with_suffix(INDEX_SUFFIX))
    num_bytes = path.stat().st_size
    tokens = np.memmap(path, dtype=np.uint8, mode="r") if num_bytes else np.zeros(0, dtype=np.uint8)
    ends = pointers + lengths * dtype.itemsize
    if len(ends) and int(ends.max()) > num_bytes:
        raise UserError(
            f"data.paths: {path} has {num_bytes} bytes, but its {INDEX_SUFFIX} speaks of {int(ends.max())}; the two "
            "files do not belong together, or one is cut short."
        )
    for number in range(len(starts) - 1):
        # A document may be several sequences.
        pieces = [tokens[pointers[i] : ends[i]].view(dtype) for i in range(starts[number], starts[number + 1])]
        yield np.concatenate([np.zeros(0, dtype), *pieces]).astype(np.int64), f"document {number} of {path}"


def _read_index(path: Path) -> tuple[np.dtype, np.ndarray, np.ndarray, np.ndarray]:
    """Type of a token; length and first byte of each sequence; first sequence of each document, and the end."""
    try:
        contents = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"data.paths: {path}, which says what is in the .bin, cannot be read: {error.strerror}."
        ) from None
    header = contents[: _HEADER.size]
    if len(header) < _HEADER.size or not header.startswith(_MAGIC):
        raise UserError(f"data.paths: {path} is no index of Megatron's; name the .bin of a pair that it has written.")
    _, version, code, num_sequences, num_documents = _HEADER.unpack(header)
    needed = _HEADER.size + 12 * num_sequences + 8 * num_documents
    if version != _VERSION or code not in _DTYPES or len(contents) < needed:
        raise UserError(
            f"data.paths: {path} is an index of version {version} with tokens of type {code} and {len(contents)} "
            f"bytes; versions {_VERSION} with whole numbers and at least {needed} bytes are read."
        )
    lengths = np.frombuffer(contents, "<i4", num_sequences, _HEADER.size).astype(np.int64)
    pointers = np.frombuffer(contents, "<i8", num_sequences, _HEADER.size + 4 * num_sequences)
    starts = np.frombuffer(contents, "<i8", num_documents, _HEADER.size + 12 * num_sequences)
    if num_documents and (starts[0] != 0 or starts[-1] != num_sequences):
        raise UserError(f"data.paths: {path} does not say where each document begins; write the pair again.")
    return np.dtype(_DTYPES[code]), lengths, pointers, starts
