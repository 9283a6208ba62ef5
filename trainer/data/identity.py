"""What tells one prepared corpus from another, and where it lies; imports no torch."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sharding.ranks.errors import UserError
from trainer.config.data import DataConfig, SourceConfig
from trainer.data.chat_template import template_text
from trainer.data.corpus import corpus_fingerprint
from trainer.data.rows_manifest import RowRecipe
from trainer.data.tokenizer import tokenizer_identity

PREPARATION_VERSION = 3
ROWS_VERSION = 3
CONVERSATIONS_VERSION = 1

# Settings that say nothing of the rows themselves; where their files lie is in the identity of their contents.
_NOT_OF_ROWS = {
    *("format", "shuffle", "skip_samples", "bucket_by_length", "cache_dir", "num_workers", "shard_tokens"),
    *("mixture", "streaming", "sample_documents", "shuffle_window", "document_mask", "paths"),
    *("validation_paths", "test_paths", "factory", "arguments", "folder"),
    *("messages_field", "chat_template", "packing"),
}


_OF_ROWS_BY_RECIPE = {
    *("source", "text_field", "label", "max_documents", "normalize", "missing", "image_size", "image_channels"),
    "audio_samples",
}


def prepared_part(config: DataConfig) -> DataConfig:
    """What is prepared of a configuration: of a streamed source the beginning."""
    return config.model_copy(update={"max_documents": config.sample_documents}) if config.streaming else config


def named_sources(config: DataConfig) -> list[tuple[str, SourceConfig]]:
    """The sources with their names; one that is alone has the empty name."""
    return [(source.name, source) for source in config.mixture] or [("", config)]


@contextlib.contextmanager
def errors_of(name: str) -> Iterator[None]:
    """Put the name of a mixture's source before what is wrong with it."""
    try:
        yield
    except UserError as error:
        raise UserError(f"data.mixture {name}: {error}" if name else str(error)) from None


def corpus_folder(config: DataConfig) -> Path:
    """Where the prepared corpus of a configuration belongs: named by all that decides its contents.

    Raises:
        UserError: a source file is missing.
    """
    config = prepared_part(config)
    if config.source == "factory":
        return prepared_root(config) / f"factory-{_digest([config.factory, config.folder, config.arguments])}"
    if config.has_rows:
        return prepared_root(config) / f"{config.source}-{_rows_key(config)}"
    settings = config.model_dump(
        mode="json",
        include=_own_settings(config) | {"normalize", "validation_fraction", "shard_tokens"},
    )
    identity = [PREPARATION_VERSION, settings, _sources_identity(config), tokenizer_identity(config)]
    if config.has_messages:
        identity.append(_conversations_identity(config))
    return prepared_root(config) / f"{source_kind(config)}-{_digest(identity)}"


def folder_by_recipe(config: DataConfig, recipe: RowRecipe, trained: str) -> Path:
    """Where rows belong that are read by a recipe that was learnt from others.

    Args:
        config: the section ``data``, with the source of these rows.
        recipe: how they are read.
        trained: fingerprint of the rows that they must not be among; empty where these are not known.

    Raises:
        UserError: a source file is missing.
    """
    # All that was learnt is in the recipe.
    settings = config.model_dump(mode="json", include=_OF_ROWS_BY_RECIPE)
    identity = [ROWS_VERSION, settings, corpus_fingerprint(config), recipe.model_dump(mode="json"), trained]
    return prepared_root(config) / f"by-recipe-{config.source}-{_digest(identity)}"


def prepared_root(config: DataConfig) -> Path:
    """The folder of all that is prepared of a kind of samples."""
    return cache_root(config) / ("rows" if config.has_rows else "corpora")


def _rows_key(config: DataConfig) -> str:
    """What tells prepared rows from others: all settings but those of where they lie and how they are visited."""
    settings = config.model_dump(mode="json", exclude=_NOT_OF_ROWS)
    files = {"train": config.paths, "validation": config.validation_paths, "test": config.test_paths}
    sources = {
        split: corpus_fingerprint(config.model_copy(update={"paths": paths}))
        for split, paths in files.items()
        if paths or split == "train"
    }
    identity = [ROWS_VERSION, settings, sources, tokenizer_identity(config)]
    return _digest(identity)


def _digest(identity: list[Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def source_kind(config: DataConfig) -> str:
    """Which kind of source it is: the beginning of the names of what is prepared from it."""
    return "mixture" if config.mixture else config.source


def _own_settings(source: SourceConfig) -> set[str]:
    """Those that decide what is read of a source's files; one that came later only where it counts, for old corpora."""
    of_kind = {"tokens_field"} if source.source == "tokens" else set()
    if source.reads_messages:
        of_kind = {"format", "messages_field"}
    return {"source", "text_field", "max_documents"} | of_kind


def _conversations_identity(config: DataConfig) -> list[Any]:
    """What decides the tokens of conversations beside their source and the tokenizer."""
    folder = Path(config.tokenizer).expanduser()
    if config.chat_template is not None:
        template = template_text(config.chat_template)
    else:
        # A template that is no file of its own is in those that tell tokenizers apart.
        template = "".join(path.read_text() for path in sorted(folder.rglob("*.jinja"))) if folder.is_dir() else ""
    return [CONVERSATIONS_VERSION, template, config.sequence_length if config.packs_whole else None]


def _sources_identity(config: DataConfig) -> str:
    if not config.mixture:
        return corpus_fingerprint(config)
    identities = []
    for name, source in named_sources(config):
        with errors_of(name):
            settings = source.model_dump(mode="json", include=_own_settings(source))
            identities.append([name, settings, corpus_fingerprint(source)])
    return hashlib.sha256(json.dumps(identities, sort_keys=True).encode()).hexdigest()


def cache_root(config: DataConfig) -> Path:
    """``data.cache_dir``, else ``$SHARDLINE_CACHE``, else ``~/.cache/shardline``."""
    text = config.cache_dir or os.environ.get("SHARDLINE_CACHE") or "~/.cache/shardline"
    return Path(text).expanduser()
