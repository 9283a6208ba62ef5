"""The tokenizer of a run inside each of its checkpoints, so that these can be used when the corpus is gone."""

import io
import zipfile
from dataclasses import dataclass
from pathlib import Path

from trainer.checkpoint.manifest import TokenizerEntry

_ARCHIVE_NAME = "tokenizer.zip"
# The same files give the same bytes.
_DATE = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True)
class TokenizerArchive:
    """A tokenizer's files in one, and what the manifest says of it."""

    contents: bytes
    entry: TokenizerEntry


def pack_tokenizer(folder: Path, vocab_size: int, eos_token_id: int | None) -> TokenizerArchive:
    """Put a tokenizer's files together.

    Args:
        folder: where they are.
        vocab_size: largest id and one.
        eos_token_id: token that ends a document; None where there is none.
    """
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                name = zipfile.ZipInfo(str(path.relative_to(folder)), _DATE)
                archive.writestr(name, path.read_bytes(), zipfile.ZIP_DEFLATED)
    entry = TokenizerEntry(file=_ARCHIVE_NAME, vocab_size=vocab_size, eos_token_id=eos_token_id)
    return TokenizerArchive(packed.getvalue(), entry)


def unpack_tokenizer(contents: bytes, folder: Path) -> None:
    """Write a tokenizer's files into a folder, which is made where there is none."""
    with zipfile.ZipFile(io.BytesIO(contents)) as archive:
        archive.extractall(folder)
