"""Rows of local files as mappings of columns, also of compressed files."""

import csv
import importlib
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

from sharding.ranks.errors import UserError

_PARQUET_BATCH_ROWS = 256
_BYTE_ORDER_MARK = "\ufeff"
_PARQUET_MAGIC = b"PAR1"
_ZSTANDARD_MAGIC = b"\x28\xb5\x2f\xfd"
_MODULES = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\xfd7zXZ\x00": "lzma"}
# The library's own limit is 128 KiB, which a document may exceed.
_MAX_CSV_FIELD_BYTES = 2**31 - 1


def open_decompressed(path: Path) -> BinaryIO:
    """Open a file that may be compressed, which its first bytes tell."""
    with path.open("rb") as file:
        begins = file.read(6)
    if begins.startswith(_ZSTANDARD_MAGIC):
        import zstandard

        # Several frames one behind the other are one file, as the format's own tool has it.
        reader = zstandard.ZstdDecompressor().stream_reader(path.open("rb"), read_across_frames=True)
        return io.BufferedReader(cast(io.RawIOBase, reader))
    # Imported when needed: an interpreter may have been built without one of them.
    module = next((module for magic, module in _MODULES.items() if begins.startswith(magic)), None)
    return path.open("rb") if module is None else importlib.import_module(module).open(path, "rb")


def json_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of JSON lines, or of a list of objects, and where each is."""
    with open_decompressed(path) as file:
        is_first = True
        for line_number, line in enumerate(file, start=1):
            text = decode(line, path, line_number).strip()
            if not text:
                continue
            place = f"line {line_number} of {path}"
            if is_first and (text.startswith("[") or text == "{"):
                rest = decode(file.read(), path, line_number + 1)
                rows = _parse(f"{text}\n{rest}", path, line_number)
                for number, row in enumerate(rows if isinstance(rows, list) else [rows]):
                    yield _checked_row(row, f"row {number} of {path}")
                return
            is_first = False
            yield _checked_row(_parse(text, path, line_number), place)


def _checked_row(row: Any, place: str) -> tuple[str, dict[str, Any]]:
    if not isinstance(row, dict):
        raise UserError(f"data.paths: {place} is {type(row).__name__} and no object with columns; mend or remove it.")
    return place, row


def _parse(text: str, path: Path, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise UserError(
            f"data.paths: line {line} of {path} is not JSON ({error.msg} at character {error.colno}); mend or remove "
            "it."
        ) from None
    except RecursionError:
        raise UserError(
            f"data.paths: line {first_line} of {path} is nested too deeply to be read; mend or remove it."
        ) from None


def open_parquet(path: Path) -> Any:
    """A Parquet file, which may be compressed as a whole; None where there is nothing in it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    place: Any = path
    with path.open("rb") as file:
        is_plain = file.read(4) == _PARQUET_MAGIC
    if not is_plain:
        # The format is read from its end, which a stream that is being decompressed does not have.
        with open_decompressed(path) as decompressed:
            contents = decompressed.read()
        if not contents:
            return None
        place = pa.py_buffer(contents)
    return pq.ParquetFile(place)


def parquet_rows(path: Path, columns: Sequence[str] | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a Parquet file, all columns or some, and where each is."""
    table = open_parquet(path)
    if table is None:
        return
    number = 0
    for batch in table.iter_batches(batch_size=_PARQUET_BATCH_ROWS, columns=columns):
        for row in batch.to_pylist():
            yield f"row {number} of {path}", row
            number += 1


def csv_rows(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Rows of a file of comma-separated values with a header, of a ``.tsv`` with tabs, and where each is.

    Raises:
        UserError: a row has more or fewer values than the header, or the file is not UTF-8.
    """
    csv.field_size_limit(_MAX_CSV_FIELD_BYTES)
    delimiter = "\t" if ".tsv" in path.suffixes else ","
    with open_decompressed(path) as file:
        lines = (decode(line, path, number) for number, line in enumerate(file, start=1))
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        try:
            header = next(reader, None)
            for values in reader:
                if not values:
                    continue
                if len(values) != len(header or ()):
                    raise UserError(
                        f"data.paths: line {reader.line_num} of {path} has {len(values)} values and the header "
                        f"{len(header or ())}; mend or remove it."
                    )
                yield f"line {reader.line_num} of {path}", dict(zip(header or (), values, strict=True))
        except csv.Error as error:
            raise UserError(
                f"data.paths: line {reader.line_num} of {path} is not CSV ({error}); mend or remove it."
            ) from None


def decode(contents: bytes, path: Path, first_line: int) -> str:
    """Bytes of a file as text, without a byte order mark.

    Args:
        contents: the bytes.
        path: their file, to speak of.
        first_line: number of the line that they begin with.

    Raises:
        UserError: they are not UTF-8.
    """
    try:
        text = contents.decode("utf-8")
    except UnicodeDecodeError as error:
        line = first_line + contents.count(b"\n", 0, error.start)
        byte = contents[error.start]
        raise UserError(
            f"data.paths: line {line} of {path} is not UTF-8 (byte 0x{byte:02x}); convert the file, or mend the line."
        ) from None
    return text.removeprefix(_BYTE_ORDER_MARK) if first_line == 1 else text
