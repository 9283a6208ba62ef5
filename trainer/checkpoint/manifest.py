"""What a checkpoint's manifest says; a checkpoint exists if and only if its manifest does."""

import hashlib
import json
from typing import Any

from pydantic import ValidationError

from sharding.ranks.errors import UserError
from sharding.strict_model import StrictRecord
from trainer.checkpoint.training_state import TrainingState
from trainer.files.checked_json import dump_checked, load_checked
from trainer.files.outages import StorageOutage, is_outage
from trainer.files.storage import CheckpointPath, reaching, write_whole
from trainer.run_folder.listing import MANIFEST_NAME

FORMAT_VERSION = 4
FORMAT_VERSION_WITH_BASE = 5
FORMAT_VERSION_IN_16_BITS = 6
PRECISION_RULE = 1
"""The rule of ``sharding.precision``; runs in 16 bits before it had none, and their strategy said what was rounded."""
# Checkpoints of the first of them have no tokenizer.
_READ_VERSIONS = (3, FORMAT_VERSION, FORMAT_VERSION_WITH_BASE, FORMAT_VERSION_IN_16_BITS)
_CHUNK_BYTES = 8 * 2**20


class CorruptCheckpoint(UserError):
    """A checkpoint that is not as it was written; an older one may still be complete."""

    def __init__(self, folder: object, reason: str) -> None:
        """Say what is wrong with which."""
        super().__init__(f"checkpoint {folder} is corrupt: {reason}; choose another step, or restore it from a copy.")
        self.folder, self.reason = str(folder), reason

    def __reduce__(self) -> tuple[Any, ...]:
        """Ranks tell each other."""
        return type(self), (self.folder, self.reason)


class SliceEntry(StrictRecord):
    """One stored part of a tensor."""

    file: str
    """Name of the safetensors file in the checkpoint's folder."""

    key: str
    """The part's key in that file."""

    offsets: list[int]
    """Index of the part's first element in the whole tensor, per dim."""

    shape: list[int]
    """Shape of the part."""


class TensorEntry(StrictRecord):
    """One tensor of the canonical state."""

    dtype: str
    """torch's name of the element type, such as `float32`."""

    shape: list[int]
    """Shape of the whole tensor."""

    slices: list[SliceEntry]
    """The parts that make it up."""


class FileEntry(StrictRecord):
    """One file of a checkpoint."""

    num_bytes: int
    """Size."""

    sha256: str
    """SHA-256 of the contents, in hexadecimal digits."""


class TokenizerEntry(StrictRecord):
    """The tokenizer of the corpus that the run is trained on."""

    file: str
    """Name of the zip archive of its files in the checkpoint's folder."""

    vocab_size: int
    """Largest token id and one."""

    eos_token_id: int | None
    """Token that ends each document; None where the tokenizer has none, and rows are read."""


class Manifest(StrictRecord):
    """A complete checkpoint."""

    format_version: int
    """Version of this layout."""

    training: TrainingState
    """Counters and identities."""

    config: dict[str, Any]
    """The run's configuration."""

    config_fingerprint: str
    """SHA-256 of the configuration."""

    data_fingerprint: str
    """Fingerprint of the prepared corpus."""

    num_ranks: int
    """Ranks that wrote the checkpoint."""

    strategy: str
    """Parallel strategy that it was written under; any other can read it."""

    tensors: dict[str, TensorEntry]
    """The canonical state."""

    tokenizer: TokenizerEntry | None = None
    """The tokenizer; None in checkpoints of format version 3."""

    recipe_file: str | None = None
    """Name of the file that says how rows become what the model reads; None where samples are packed tokens."""

    files: dict[str, FileEntry]
    """Every other file of the checkpoint."""

    base: str | None = None
    """Name of the folder beside the checkpoint's in which the frozen parameters are; None in format versions before 5,
    and where nothing is frozen."""

    precision_rule: int | None = None
    """Number of the rule by which the run computes in 16 bits; None in fp32, and in format versions before 6."""


def fingerprint(values: Any) -> str:
    """SHA-256 of plain values in a canonical JSON form."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def write_manifest(folder: CheckpointPath, manifest: Manifest) -> None:
    """Make a checkpoint exist: the last thing that is written to its folder."""
    write_whole(folder / MANIFEST_NAME, render_manifest(manifest))


def render_manifest(manifest: Manifest) -> bytes:
    """The contents of a manifest's file, with a checksum of their own."""
    values = manifest.model_dump(mode="json")
    for name in ("base", "precision_rule"):
        if values[name] is None:
            # Byte for byte what it was before there was one.
            del values[name]
    return dump_checked(values)


def read_manifest(folder: CheckpointPath) -> Manifest:
    """Read a checkpoint's manifest.

    Raises:
        UserError: there is none, or it is of another version.
        CorruptCheckpoint: it is not as it was written.
        StorageOutage: it cannot be read for now.
    """
    try:
        raw = (folder / MANIFEST_NAME).read_bytes()
    except FileNotFoundError:
        raise UserError(f"{folder} is not a checkpoint: it has no {MANIFEST_NAME}; name another step.") from None
    except OSError as error:
        raise unreadable(folder, MANIFEST_NAME, error) from None
    return parse_manifest(raw, folder)


def unreadable(folder: CheckpointPath, name: str, error: OSError) -> CorruptCheckpoint | StorageOutage:
    """What to raise where a file of a checkpoint cannot be read: a file system that is away has corrupted nothing."""
    if is_outage(error):
        return StorageOutage(f"{name} of {folder} cannot be read for now: {error.strerror}; run again to continue.")
    return CorruptCheckpoint(folder, f"{name} cannot be read ({error.strerror})")


def parse_manifest(raw: bytes, folder: object) -> Manifest:
    """The manifest that the contents of its file say.

    Args:
        raw: the contents.
        folder: the checkpoint, to speak of.

    Raises:
        UserError: it is of another version.
        CorruptCheckpoint: it is not as it was written.
    """
    try:
        # Earlier versions had no checksum, and began with their number.
        values = {} if raw.startswith(b'{"format_version": ') else load_checked(raw)
        if values.get("format_version") in _READ_VERSIONS:
            return Manifest.model_validate(values)
    except (ValueError, ValidationError) as error:
        raise CorruptCheckpoint(folder, f"{MANIFEST_NAME}: {str(error).splitlines()[0]}") from None
    raise UserError(
        f"{folder} has {MANIFEST_NAME} of format version {values.get('format_version', 'below 3')}, but this Shardline "
        f"reads {_READ_VERSIONS[0]} to {_READ_VERSIONS[-1]}; use the release that wrote it."
    )


def hash_file(path: CheckpointPath) -> str:
    """SHA-256 of a file's contents."""
    digest = hashlib.sha256()
    with reaching(path), path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
