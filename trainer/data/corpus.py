"""Documents of a corpus, in source order, and the cleaning each goes through."""

import contextlib
import hashlib
import json
import sys
import unicodedata
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from sharding.ranks.errors import UserError
from trainer.config.data import CONVERSATIONS, SourceConfig
from trainer.data.conversations import hub_conversation
from trainer.data.files import Document, find_files, read_file
from trainer.data.generated import GENERATOR_VERSION
from trainer.data.python_stdlib import stdlib_files, stdlib_folder
from trainer.data.stdlib_questions import QUESTIONS_VERSION, stdlib_questions
from trainer.data.token_files import INDEX_SUFFIX

_EMBEDDED = ("python-stdlib", CONVERSATIONS)


def corpus_fingerprint(config: SourceConfig) -> str:
    """Identity of the source: paths, sizes and times of its files, or its hub name. Reads no contents.

    Raises:
        UserError: a file is missing.
    """
    if config.source == "hub":
        identity: list[Any] = [config.hub_name, config.hub_config, config.hub_split]
    elif config.source == "tones":
        identity = [config.source, GENERATOR_VERSION]
    elif config.source == "digits" or (config.source == "table" and not config.paths):
        # The package's release decides what it bundles.
        identity = [config.source, GENERATOR_VERSION, _release_of_scikit_learn()]
    else:
        files = all_files(config)
        # What is in a file of tokens is said beside it.
        files += [
            path.with_suffix(INDEX_SUFFIX) for path in files if config.source == "tokens" and path.suffix == ".bin"
        ]
        identity = [
            (str(path.absolute()), path.stat().st_size, path.stat().st_mtime_ns) for path in files if path.exists()
        ]
        if config.source in _EMBEDDED:
            identity.append(sys.version)
        if config.source == CONVERSATIONS:
            identity.append(QUESTIONS_VERSION)
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()


def read_documents(config: SourceConfig, pass_over: Callable[[Path], None] = lambda _: None) -> Iterator[Document]:
    """Every document of the corpus as it stands in the source.

    Args:
        config: the source.
        pass_over: told of files in which there is nothing.

    Raises:
        UserError: a file cannot be read, or has no column ``data.text_field``.
    """
    documents = _read_source(config, pass_over)
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
    return stdlib_files() if config.source in _EMBEDDED else find_files(config).files


def hub_rows(config: SourceConfig) -> Any:
    """The rows of a data set of the hub, read as they come, without a copy in a cache."""
    import datasets

    return datasets.load_dataset(config.hub_name, config.hub_config, split=config.hub_split, streaming=True)


def text_of(row: dict[str, Any], config: SourceConfig, where: str) -> str:
    """The text of a row of the hub; empty where it is null.

    Raises:
        UserError: the row has no column ``data.text_field``, or it holds something else.
    """
    column = config.text_field
    if column not in row:
        raise UserError(
            f"data.text_field={column} is not a column of {where}, which has {', '.join(row)}; name one of them."
        )
    if row[column] is None or isinstance(row[column], str):
        return row[column] or ""
    raise UserError(f"data.text_field={column}: {where} is not text; name another column.")


def read_local_file(path: Path, config: SourceConfig) -> Iterator[Document]:
    """The documents of one local file.

    Raises:
        UserError: it cannot be read, or a row is not what it should be.
    """
    with reading(config, str(path)):
        if config.source == "python-stdlib":
            text = path.read_text(encoding="utf-8", errors="replace")
            yield Document(text, str(path.relative_to(stdlib_folder())))
        else:
            yield from read_file(path, config)


@contextlib.contextmanager
def reading(config: SourceConfig, name: str) -> Iterator[None]:
    """Turn what a library raises into a sentence."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 - each format's library has errors of its own
        cause = error.__cause__ or error
        reason = " ".join(str(cause).split())[:300]
        setting = {"hub": "data.hub_name", **dict.fromkeys(_EMBEDDED, "data.source")}.get(config.source, "data.paths")
        raise UserError(
            f"{setting}: {name} cannot be read ({type(cause).__name__}: {reason}); check the source."
        ) from None


def _release_of_scikit_learn() -> str:
    try:
        return version("scikit-learn")
    except PackageNotFoundError:
        raise UserError(
            "data.source: digits and tables by name are bundled with scikit-learn, which is not installed; install it "
            "with pip install 'shardline[tasks]', or name files with data.paths."
        ) from None


def _read_source(config: SourceConfig, pass_over: Callable[[Path], None]) -> Iterator[Document]:
    if config.source == "hub":
        with reading(config, f"{config.hub_name}"):
            for number, row in enumerate(hub_rows(config)):
                name, place = f"{config.hub_name}#{number}", f"row {number} of {config.hub_name}"
                if config.reads_messages:
                    yield Document(hub_conversation(row, config, place), name)
                else:
                    yield Document(text_of(row, config, place), name)
        return
    if config.source == CONVERSATIONS:
        with reading(config, config.source):
            for question in stdlib_questions():
                yield Document(question.conversation, question.source_id, group=question.module)
        return
    for path in all_files(config):
        is_empty = True
        for document in read_local_file(path, config):
            is_empty = False
            yield document
        if is_empty:
            pass_over(path)
