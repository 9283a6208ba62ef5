"""Documents of a corpus, in source order, and the cleaning each goes through."""

import contextlib
import glob
import hashlib
import json
import sys
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sharding.errors import UserError
from trainer.data.config import SourceConfig
from trainer.data.python_stdlib import stdlib_files, stdlib_folder

_SUFFIXES = {"text": (".txt", ".md"), "jsonl": (".jsonl", ".json"), "parquet": (".parquet",)}
_BUILDERS = {"text": "text", "python-stdlib": "text", "jsonl": "json", "parquet": "parquet"}


@dataclass(frozen=True)
class Document:
    """A text and where it came from: a path, with ``#row`` where a file holds several."""

    text: str
    source_id: str


def corpus_fingerprint(config: SourceConfig) -> str:
    """Identity of the source: paths, sizes and times of its files, or its hub name. Reads no contents.

    Raises:
        UserError: a file is missing.
    """
    if config.source == "hub":
        identity: list[Any] = [config.hub_name, config.hub_config, config.hub_split]
    else:
        files = all_files(config)
        identity = [(str(path.absolute()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        if config.source == "python-stdlib":
            identity.append(sys.version)
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()


def source_files(config: SourceConfig) -> list[Path]:
    """The files that ``data.paths`` names, in the order given, those of a folder or pattern sorted.

    Raises:
        UserError: a path names nothing.
    """
    files: list[Path] = []
    for text in config.paths:
        path = Path(text).expanduser()
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.suffix in _SUFFIXES[config.source])
        elif path.is_file():
            found = [path]
        else:
            found = sorted(Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file())
        if not found:
            endings = " or ".join(_SUFFIXES[config.source])
            raise UserError(
                f"data.paths: {text} names no file (of a folder, {endings} files are read); check the path."
            )
        files += found
    return files


def read_documents(config: SourceConfig) -> Iterator[Document]:
    """Every document of the corpus as it stands in the source.

    Raises:
        UserError: a file cannot be read, or has no column ``data.text_field``.
    """
    documents = _read_source(config)
    if config.max_documents == 0:
        yield from documents
        return
    for index, document in enumerate(documents):
        if index == config.max_documents:
            return
        yield document


def clean_text(text: str, normalize: str) -> str:
    """Bring a document into one form: Unicode normal form and line ends; unchanged under ``none``."""
    if normalize == "none":
        return text
    return unicodedata.normalize(normalize, text.replace("\r\n", "\n").replace("\r", "\n"))  # type: ignore[arg-type]


def all_files(config: SourceConfig) -> list[Path]:
    """The files of a local source.

    Raises:
        UserError: a path names nothing.
    """
    return stdlib_files() if config.source == "python-stdlib" else source_files(config)


def dataset_arguments(config: SourceConfig, files: list[Path]) -> dict[str, Any]:
    """What ``datasets.load_dataset`` reads a source with, or only some files of it."""
    if config.source == "hub":
        return {"path": config.hub_name, "name": config.hub_config, "split": config.hub_split}
    names = [str(path) for path in files]
    arguments: dict[str, Any] = {"path": _BUILDERS[config.source], "data_files": names, "split": "train"}
    if config.source in ("text", "python-stdlib"):
        arguments["sample_by"] = "document"
    if config.source == "python-stdlib":
        arguments["encoding_errors"] = "replace"
    return arguments


def text_of(row: dict[str, Any], config: SourceConfig, where: str) -> str | None:
    """The text of a row; None where there is none.

    Raises:
        UserError: the row has no column ``data.text_field``, or it holds something else.
    """
    column = "text" if config.source in ("text", "python-stdlib") else config.text_field
    if column not in row:
        raise UserError(
            f"data.text_field={column} is not a column of {where}, which has {', '.join(row)}; name one of them."
        )
    if row[column] is None or isinstance(row[column], str):
        return row[column]
    raise UserError(f"data.text_field={column}: {where} is not text; name another column.")


@contextlib.contextmanager
def reading(config: SourceConfig, name: str) -> Iterator[None]:
    """Turn what ``datasets`` raises into a sentence."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 - datasets raises a different family for each format
        cause = error.__cause__ or error
        reason = " ".join(str(cause).split())[:300]
        setting = "data.hub_name" if config.source == "hub" else "data.paths"
        raise UserError(
            f"{setting}: {name} cannot be read ({type(cause).__name__}: {reason}); check the source."
        ) from None


def _read_source(config: SourceConfig) -> Iterator[Document]:
    if config.source == "python-stdlib":
        root = stdlib_folder()
        for path in stdlib_files():
            yield Document(path.read_text(encoding="utf-8", errors="replace"), str(path.relative_to(root)))
    elif config.source == "hub":
        yield from _read_rows(config, [], f"{config.hub_name}")
    else:
        for path in source_files(config):
            yield from _read_rows(config, [path], str(path))


def _read_rows(config: SourceConfig, files: list[Path], name: str) -> Iterator[Document]:
    import datasets

    with reading(config, name):
        # Streaming reads the source as it is, without a second copy in a cache.
        rows = datasets.load_dataset(streaming=True, **dataset_arguments(config, files))
        for number, row in enumerate(rows):
            text = text_of(row, config, f"row {number} of {name}")
            if text is not None:
                yield Document(text, name if config.source == "text" else f"{name}#{number}")
