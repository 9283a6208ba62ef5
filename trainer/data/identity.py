"""What tells one prepared corpus from another, and where it lies; imports no torch."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from sharding.ranks.errors import UserError
from trainer.config.data import DataConfig, SourceConfig
from trainer.data.corpus import corpus_fingerprint
from trainer.data.tokenizer import tokenizer_identity

PREPARATION_VERSION = 3


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
    settings = config.model_dump(
        mode="json",
        include={"source", "text_field", "max_documents", "normalize", "validation_fraction", "shard_tokens"},
    )
    identity = [PREPARATION_VERSION, settings, _sources_identity(config), tokenizer_identity(config)]
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    return cache_root(config) / "corpora" / f"{source_kind(config)}-{key}"


def source_kind(config: DataConfig) -> str:
    """Which kind of source it is: the beginning of the names of what is prepared from it."""
    return "mixture" if config.mixture else config.source


def _sources_identity(config: DataConfig) -> str:
    if not config.mixture:
        return corpus_fingerprint(config)
    identities = []
    for name, source in named_sources(config):
        with errors_of(name):
            settings = source.model_dump(mode="json", include={"source", "text_field", "max_documents"})
            identities.append([name, settings, corpus_fingerprint(source)])
    return hashlib.sha256(json.dumps(identities, sort_keys=True).encode()).hexdigest()


def cache_root(config: DataConfig) -> Path:
    """``data.cache_dir``, else ``$SHARDLINE_CACHE``, else ``~/.cache/shardline``."""
    text = config.cache_dir or os.environ.get("SHARDLINE_CACHE") or "~/.cache/shardline"
    return Path(text).expanduser()
