"""A folder of what is prepared: its manifest, and files that are as it says."""

from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from sharding.ranks.errors import UserError
from trainer.data.corpus_manifest import CorpusManifest
from trainer.data.rows_manifest import RowsManifest
from trainer.data.shards import check_files, hash_files
from trainer.files.checked_json import load_checked

MANIFEST_NAME = "manifest.json"
TOKENIZER_FOLDER = "tokenizer"

Manifest = TypeVar("Manifest", CorpusManifest, RowsManifest)


def open_manifest(folder: Path, kind: type[Manifest]) -> Manifest:
    """A folder's manifest, whose files are there in the sizes that it says, and its tokenizer as it was written.

    Raises:
        UserError: the manifest or the tokenizer is corrupt, or a file has another size than the manifest says.
    """
    try:
        manifest = kind.model_validate(load_checked((folder / MANIFEST_NAME).read_bytes()))
    except (OSError, ValueError, ValidationError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{folder / MANIFEST_NAME} is corrupt ({reason}); delete the folder {folder} to prepare again."
        ) from None
    for split in manifest.splits.values():
        check_files(folder, split.files)
    check_files(folder, manifest.tokenizer_files)
    # Small, and read by libraries that would not say so.
    hash_files(folder, manifest.tokenizer_files)
    return manifest
