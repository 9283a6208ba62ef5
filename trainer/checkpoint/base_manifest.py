"""What a base's manifest says: the frozen parameters of a run, written once beside the checkpoints that refer to them.

Imports no torch, so that the launcher may look before it starts ranks.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from pydantic import ValidationError

from sharding.ranks.errors import UserError
from sharding.strict_model import StrictRecord
from trainer.checkpoint.layout import check_sizes
from trainer.checkpoint.manifest import CorruptCheckpoint, FileEntry, TensorEntry, unreadable
from trainer.files.checked_json import dump_checked, load_checked
from trainer.files.storage import CheckpointPath, list_folders, write_whole
from trainer.run_folder.listing import MANIFEST_NAME

BASE_FORMAT_VERSION = 1
_NAME = re.compile(r"base-[0-9a-f]{16}")


class BaseManifest(StrictRecord):
    """A complete base; it exists if and only if its manifest does."""

    format_version: int = BASE_FORMAT_VERSION
    """Version of this layout."""

    contents_hash: str
    """SHA-256, in hexadecimal digits, of names, types, shapes and of a hash of all values that knows no layout; the
    folder is named after its beginning."""

    tensors: dict[str, TensorEntry]
    """The frozen parameters, as the canonical state names them."""

    files: dict[str, FileEntry]
    """Every other file of the base."""


class CorruptBase(UserError):
    """A base that is missing or not as it was written: no checkpoint that refers to it can be read."""

    def __init__(self, folder: object, reason: str) -> None:
        """Say what is wrong with which."""
        super().__init__(
            f"the frozen parameters {folder} are corrupt: {reason}; every checkpoint beside that refers to them needs "
            "them: restore that folder from a copy."
        )
        self.folder, self.reason = str(folder), reason

    def __reduce__(self) -> tuple[type["CorruptBase"], tuple[str, str]]:
        """Ranks tell each other."""
        return type(self), (self.folder, self.reason)


def base_name(contents_hash: str) -> str:
    """Name of the folder of a base."""
    return f"base-{contents_hash[:16]}"


def base_folder(checkpoint: CheckpointPath, name: str) -> CheckpointPath:
    """The base that a checkpoint's manifest names: it lies beside the checkpoint.

    Raises:
        CorruptCheckpoint: the manifest names something else.
    """
    if not _NAME.fullmatch(name):
        raise CorruptCheckpoint(checkpoint, f"the manifest names the base {name!r}, which is no name of one")
    return checkpoint.parent / name


def list_bases(checkpoints: CheckpointPath) -> list[CheckpointPath]:
    """Folders of bases beside checkpoints, also of those that are not written yet, or are deleted in part."""
    return [folder for folder in list_folders(checkpoints) if _NAME.fullmatch(folder.name)]


def write_base_manifest(folder: CheckpointPath, manifest: BaseManifest) -> None:
    """Make a base exist: the last thing that is written to its folder."""
    write_whole(folder / MANIFEST_NAME, dump_checked(manifest.model_dump(mode="json")))


def read_base(folder: CheckpointPath) -> BaseManifest:
    """Read a base's manifest.

    Raises:
        CorruptBase: there is none, or it is not as it was written.
        UserError: it is of a later version.
        StorageOutage: it cannot be read for now.
    """
    try:
        with blaming_base(folder):
            values = load_checked(_read(folder))
        if values.get("format_version") != BASE_FORMAT_VERSION:
            raise UserError(
                f"{folder} has {MANIFEST_NAME} of format version {values.get('format_version')}, but this Shardline "
                f"reads {BASE_FORMAT_VERSION}; use the release that wrote it."
            )
        manifest = BaseManifest.model_validate(values)
    except (ValueError, ValidationError) as error:
        raise CorruptBase(folder, f"{MANIFEST_NAME}: {str(error).splitlines()[0]}") from None
    if base_name(manifest.contents_hash) != folder.name:
        raise CorruptBase(folder, f"{MANIFEST_NAME} is of {base_name(manifest.contents_hash)}")
    return manifest


def check_base_sizes(checkpoint: CheckpointPath, name: str) -> None:
    """Compare the sizes of all files of the base that a checkpoint refers to with its manifest.

    Raises:
        CorruptBase: a file is missing or has another size, or there is no base.
        StorageOutage: they cannot be looked at for now.
    """
    folder = base_folder(checkpoint, name)
    manifest = read_base(folder)
    with blaming_base(folder):
        check_sizes(folder, manifest.files)


def _read(folder: CheckpointPath) -> bytes:
    try:
        return (folder / MANIFEST_NAME).read_bytes()
    except FileNotFoundError:
        raise CorruptCheckpoint(folder, f"there is no {MANIFEST_NAME}") from None
    except OSError as error:
        raise unreadable(folder, MANIFEST_NAME, error) from None


@contextmanager
def blaming_base(folder: CheckpointPath) -> Iterator[None]:
    """Within, what is said to be corrupt is a base."""
    try:
        yield
    except CorruptCheckpoint as error:
        raise CorruptBase(folder, error.reason) from None
