"""A prepared corpus: a folder with a manifest, found without loading any heavy library."""

import hashlib
import json
import os
from pathlib import Path

from pydantic import ValidationError

from sharding.errors import UserError
from sharding.strict_model import StrictModel
from trainer.data.config import DataConfig
from trainer.data.corpus import corpus_fingerprint
from trainer.data.shards import SplitFacts, TokenStream, check_files, hash_files
from trainer.data.tokenizer import tokenizer_identity

PREPARATION_VERSION = 1
MANIFEST_NAME = "manifest.json"
TOKENIZER_FOLDER = "tokenizer"


class CorpusManifest(StrictModel):
    """What a prepared corpus says of itself."""

    preparation_version: int
    """Version of this layout and of the cleaning rules."""

    dtype: str
    """NumPy type of a token: `<u2` or `<u4`."""

    vocab_size: int
    """Tokens of the tokenizer."""

    eos_token_id: int
    """Token that ends each document."""

    tokenizer_sha256: str
    """Fingerprint of the tokenizer."""

    corpus_sha256: str
    """SHA-256 of all cleaned documents in order."""

    python_version: str
    """Interpreter that prepared it; the embedded corpus depends on it."""

    num_documents_read: int
    """Documents in the source."""

    num_empty: int
    """Documents dropped for being empty."""

    num_duplicates: int
    """Documents dropped for being equal to an earlier one."""

    splits: dict[str, SplitFacts]
    """`train` and `validation`."""


class PreparedCorpus:
    """Tokens, documents and tokenizer of a corpus."""

    def __init__(self, folder: Path) -> None:
        """Open a prepared corpus.

        Raises:
            UserError: the manifest is damaged, or a file has another size than it says.
        """
        self.folder = folder
        try:
            self.manifest = CorpusManifest.model_validate(json.loads((folder / MANIFEST_NAME).read_bytes()))
        except (ValueError, ValidationError):
            raise UserError(
                f"{folder / MANIFEST_NAME} is damaged; delete the folder {folder} to prepare again."
            ) from None
        for split in self.manifest.splits.values():
            check_files(folder, [*split.shards, split.documents, split.source_offsets, split.sources])

    @property
    def vocab_size(self) -> int:
        """Tokens of the tokenizer."""
        return self.manifest.vocab_size

    @property
    def eos_token_id(self) -> int:
        """Token that ends each document."""
        return self.manifest.eos_token_id

    @property
    def tokenizer_dir(self) -> Path:
        """Folder that `AutoTokenizer.from_pretrained` loads."""
        return self.folder / TOKENIZER_FOLDER

    @property
    def fingerprint(self) -> str:
        """Identity of the tokens: equal for equal corpora, wherever and whenever they were prepared."""
        shards = {name: [shard.sha256 for shard in split.shards] for name, split in self.manifest.splits.items()}
        identity = json.dumps([self.manifest.tokenizer_sha256, shards], sort_keys=True)
        return hashlib.sha256(identity.encode()).hexdigest()

    def check_sequence_length(self, sequence_length: int) -> None:
        """Assert that there is at least one whole training sequence.

        Raises:
            UserError: the training split is shorter.
        """
        num_tokens = self.manifest.splits["train"].num_tokens
        if num_tokens <= sequence_length:
            raise UserError(
                f"data.sequence_length={sequence_length} needs a training split of at least {sequence_length + 1} "
                f"tokens, but this one has {num_tokens}; lower it, add documents, or lower data.validation_fraction."
            )

    def stream(self, split: str) -> TokenStream:
        """The tokens of ``train`` or ``validation``."""
        return TokenStream(self.folder, self.manifest.splits[split], self.manifest.dtype)

    def verify(self) -> None:
        """Compare the contents of every file with the manifest.

        Raises:
            UserError: a file has changed.
        """
        for split in self.manifest.splits.values():
            hash_files(self.folder, [*split.shards, split.documents, split.source_offsets, split.sources])


def find_prepared(config: DataConfig) -> PreparedCorpus | None:
    """The prepared corpus of a configuration, if there is one. Imports neither torch nor datasets.

    Raises:
        UserError: a source file is missing, or the prepared corpus is damaged.
    """
    folder = corpus_folder(config)
    return PreparedCorpus(folder) if (folder / MANIFEST_NAME).exists() else None


def corpus_folder(config: DataConfig) -> Path:
    """Where the prepared corpus of a configuration belongs: named by all that decides its contents."""
    settings = config.model_dump(
        mode="json",
        include={"source", "text_field", "max_documents", "normalize", "validation_fraction", "shard_tokens"},
    )
    identity = [PREPARATION_VERSION, settings, corpus_fingerprint(config), tokenizer_identity(config)]
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    return cache_root(config) / "corpora" / f"{config.source}-{key}"


def cache_root(config: DataConfig) -> Path:
    """``data.cache_dir``, else ``$SHARDLINE_CACHE``, else ``~/.cache/shardline``."""
    text = config.cache_dir or os.environ.get("SHARDLINE_CACHE") or "~/.cache/shardline"
    return Path(text).expanduser()
