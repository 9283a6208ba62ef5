"""Local files of documents: which files a source names, and the rows that are in them.

Files are read here and not by ``datasets``: that takes the columns of a JSON-lines file from its first 10 MB and fails
on a later row with another one, and it counts lines from the beginning of a block.
"""

import glob
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sharding.ranks.errors import UserError
from trainer.config.data import SourceConfig
from trainer.data.conversations import read_conversations
from trainer.data.row_files import csv_rows, decode, json_rows, open_decompressed, open_parquet, parquet_rows
from trainer.data.token_files import read_tokens

_SUFFIXES = {
    "text": (".txt", ".md"),
    "jsonl": (".jsonl", ".ndjson", ".json"),
    "parquet": (".parquet",),
    "csv": (".csv", ".tsv"),
    "tokens": (".parquet", ".bin"),
    "table": (".csv", ".tsv", ".parquet"),
    "images": (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff"),
    "audio": (".wav", ".flac", ".ogg", ".mp3"),
}
_COMPRESSED_SUFFIXES = (".gz", ".zst", ".bz2", ".xz")
# A file may lack the column in some rows, but one that begins with so many such rows has another one.
_MAX_ROWS_WITHOUT_COLUMN = 10_000


@dataclass(frozen=True)
class Document:
    """A text, or the tokens of one, and where it came from: a path, with ``#row`` where a file holds several.

    Attributes:
        text: the text; of a conversation JSON, see ``trainer.data.conversations``.
        source_id: where it came from.
        tokens: those of a text that is not there.
        group: documents of the same group are on the same side of a split; empty where each decides for itself.
    """

    text: str
    source_id: str
    tokens: np.ndarray | None = None
    group: str = ""


@dataclass
class FoundFiles:
    """What ``data.paths`` names.

    Attributes:
        files: the files to read, in the order given, those of a folder or pattern sorted.
        passed_over: files of folders that are of another kind by their names.
    """

    files: list[Path] = field(default_factory=list)
    passed_over: list[Path] = field(default_factory=list)


def find_files(config: SourceConfig) -> FoundFiles:
    """The files of a source: a path is a path where there is something by its name, else a glob pattern.

    Raises:
        UserError: a path names nothing.
    """
    found = FoundFiles()
    for text in config.paths:
        path = Path(text).expanduser()
        passed_over: list[Path] = []
        if path.is_dir():
            files = _files_below(path)
            passed_over = [p for p in files if not _is_of_kind(p, config.source)]
            files = [p for p in files if _is_of_kind(p, config.source)]
        elif path.is_file():
            files = [path]
        else:
            files = sorted(Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file())
        if not files:
            raise UserError(
                f"data.paths: {text} names no file (of a folder, {name_endings(config.source)} are read); check the "
                f"path{_and_not(passed_over)}."
            )
        found.files += files
        found.passed_over += passed_over
    return found


def source_of_files(paths: Iterable[str]) -> str:
    """The kind of source that files of texts are, by their names: ``text``, ``jsonl``, ``parquet`` or ``csv``.

    Raises:
        UserError: their names do not tell, or tell several kinds.
    """
    kinds = {
        next((kind for kind in ("text", "jsonl", "parquet", "csv") if _is_of_kind(Path(path), kind)), None)
        for path in paths
    }
    kind = kinds.pop() if len(kinds) == 1 else None
    if kind is None:
        endings = "; ".join(name_endings(kind) for kind in ("text", "jsonl", "parquet", "csv"))
        raise UserError(f"the names of {' '.join(paths)} do not tell of what one kind they are; they end in {endings}.")
    return kind


def name_endings(source: str) -> str:
    """The names that files of a folder must have to be read, in words."""
    return f"{' or '.join(_SUFFIXES[source])}, also with {' or '.join(_COMPRESSED_SUFFIXES)} behind it,"


def name_some(paths: list[Path], limit: int = 20) -> str:
    """The paths, or the first of many."""
    more = f" and {len(paths) - limit:,} more" if len(paths) > limit else ""
    return ", ".join(str(path) for path in paths[:limit]) + more


def read_file(path: Path, config: SourceConfig) -> Iterator[Document]:
    """The documents of one file; one without a text, null or absent, is empty.

    Raises:
        UserError: a row is not what it should be, or no row has a column ``data.text_field``.
        Exception: of the library that reads the format, where the file is corrupt.
    """
    if config.source == "tokens":
        return (Document("", source_id, ids) for ids, source_id in read_tokens(path, config.tokens_field))
    if config.reads_messages:
        return (Document(text, f"{path}#{number}") for text, number in read_conversations(path, config))
    readers: dict[str, Callable[[Path, str], Iterator[Document]]] = {
        "text": _read_text,
        "jsonl": _read_json,
        "parquet": _read_parquet,
        "csv": _read_csv,
    }
    return readers[config.source](path, config.text_field)


def check_readable(files: list[Path]) -> None:
    """Assert that all files may be opened, before hours are spent on the first ones.

    Raises:
        UserError: one may not.
    """
    for path in files:
        try:
            path.open("rb").close()
        except OSError as error:
            raise UserError(f"data.paths: {path} cannot be read: {error.strerror}; check the source.") from None


def _files_below(folder: Path) -> list[Path]:
    """All files in a folder and in those in it, links to folders followed, sorted.

    Raises:
        UserError: a folder cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise UserError(f"data.paths: {error.filename} cannot be read: {error.strerror}; check the source.")

    files: list[Path] = []
    seen = set()
    for place, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            # A link back.
            folders.clear()
            continue
        seen.add(real)
        files += [path for path in (Path(place, name) for name in names) if path.is_file()]
    return sorted(files)


def _is_of_kind(path: Path, source: str) -> bool:
    name = path.name.lower()
    for suffix in _COMPRESSED_SUFFIXES:
        name = name.removesuffix(suffix)
    return name.endswith(_SUFFIXES[source])


def _and_not(passed_over: list[Path]) -> str:
    return f"; there are {name_some(passed_over, 3)}" if passed_over else ""


def _read_text(path: Path, _column: str) -> Iterator[Document]:
    with open_decompressed(path) as file:
        contents = file.read()
    yield Document(decode(contents, path, 1), str(path))


def _read_json(path: Path, column: str) -> Iterator[Document]:
    others: dict[str, Any] = {}
    # Held back, so that a column that no row has is found by whoever asks for the first document.
    num_without_column = 0
    has_column = False
    for number, (place, row) in enumerate(json_rows(path)):
        if not has_column and column not in row:
            others = others or row
            num_without_column += 1
            if num_without_column >= _MAX_ROWS_WITHOUT_COLUMN:
                break
            continue
        if not has_column:
            has_column = True
            yield from (Document("", f"{path}#{earlier}") for earlier in range(num_without_column))
        yield Document(_text(row.get(column), column, place), f"{path}#{number}")
    if num_without_column and not has_column:
        raise _no_column(column, str(path), others)


def _read_parquet(path: Path, column: str) -> Iterator[Document]:
    table = open_parquet(path)
    if table is None:
        return
    names = table.schema_arrow.names
    if table.metadata.num_rows and column not in names:
        raise _no_column(column, str(path), dict.fromkeys(names))
    for number, (place, row) in enumerate(parquet_rows(path, [column])):
        yield Document(_text(row[column], column, place), f"{path}#{number}")


def _read_csv(path: Path, column: str) -> Iterator[Document]:
    for number, (place, row) in enumerate(csv_rows(path)):
        if column not in row:
            raise _no_column(column, str(path), row)
        yield Document(_text(row[column], column, place), f"{path}#{number}")


def _text(value: Any, column: str, place: str) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    raise UserError(f"data.text_field={column}: {place} is not text; name another column.")


def _no_column(column: str, where: str, row: dict[str, Any]) -> UserError:
    return UserError(
        f"data.text_field={column} is not a column of {where}, which has {', '.join(row)}; name one of them."
    )
