"""Where checkpoints lie: folders of this machine are ``Path``s; what a URL names is reached through fsspec.

``CheckpointPath`` is either, and offers to the code of checkpoints what both have: ``/``, ``name``, ``parent``,
``exists``, ``open("rb")``, ``read_bytes``. What differs is in the functions here. Imports no torch.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from sharding.ranks.errors import RunFailure, UserError
from trainer.files.atomic_files import sync_folder, write_atomically
from trainer.files.outages import StorageOutage, is_outage
from trainer.runtime.processes import ATTEMPT_VARIABLE

# Both what one request reads ahead, and what one part of an upload holds.
_BLOCK_BYTES = 16 * 2**20
_EXTRAS = {"s3": ("s3fs", "s3"), "s3a": ("s3fs", "s3"), "gs": ("gcsfs", "gs"), "gcs": ("gcsfs", "gs")}


class _Reach:
    """Whether a store has answered, so that its address is right; shared by all that is in it."""

    def __init__(self) -> None:
        # The launcher asks it before it starts ranks.
        self.has_answered = ATTEMPT_VARIABLE in os.environ


class UrlPath:
    """A file or folder of an object store: the few methods of ``Path`` that checkpoints need."""

    def __init__(self, file_system: Any, path: str, protocol: str, reach: _Reach | None = None) -> None:
        """Name a place; nothing is reached yet. Use ``locate``."""
        self._reach = reach or _Reach()
        self._file_system = file_system
        self._path = path.rstrip("/")
        self._protocol = protocol

    def __truediv__(self, name: str) -> "UrlPath":
        """A file or folder in this one."""
        return UrlPath(self._file_system, f"{self._path}/{name}", self._protocol, self._reach)

    def __str__(self) -> str:
        """The URL."""
        return f"{self._protocol}://{self._path.lstrip('/')}"

    def __repr__(self) -> str:
        """For a debugger."""
        return f"UrlPath({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        """Whether both are the same place."""
        return isinstance(other, UrlPath) and str(self) == str(other)

    def __hash__(self) -> int:
        """By place."""
        return hash(str(self))

    @property
    def name(self) -> str:
        """The last part."""
        return self._path.rpartition("/")[2]

    @property
    def parent(self) -> "UrlPath":
        """The folder that this is in."""
        return UrlPath(self._file_system, self._path.rpartition("/")[0], self._protocol, self._reach)

    def exists(self) -> bool:
        """Whether it is there now."""
        self._forget()
        with self.reached():
            # Not exists(), which takes every error, also of the way there, for a no.
            try:
                self._file_system.info(self._path)
            except FileNotFoundError:
                return False
        return True

    def num_bytes(self) -> int:
        """Size of the file.

        Raises:
            FileNotFoundError: there is none.
        """
        self._forget()
        with self.reached():
            return int(self._file_system.info(self._path)["size"])

    def read_bytes(self) -> bytes:
        """The whole file.

        Raises:
            FileNotFoundError: there is none.
        """
        with self.reached():
            return self._file_system.cat_file(self._path)

    def write_bytes(self, contents: bytes) -> None:
        """Make the file, in one request: it is complete or not there."""
        with self.reached():
            self._file_system.pipe_file(self._path, contents)

    def open(self, mode: str) -> BinaryIO:
        """Read (``rb``) with reading ahead, or write (``wb``) in parts; the file is there once it is closed."""
        with self.reached():
            return self._file_system.open(self._path, mode, block_size=_BLOCK_BYTES)

    def unlink(self) -> None:
        """Delete the file, if it is there."""
        with self.reached(), contextlib.suppress(FileNotFoundError):
            self._file_system.rm_file(self._path)

    def remove(self) -> None:
        """Delete it with all that is in it, if it is there."""
        if self._entries():
            with self.reached(), contextlib.suppress(FileNotFoundError):
                self._file_system.rm(self._path, recursive=True)

    def copy_files(self, target: "UrlPath") -> None:
        """Copy a folder's files to another one, within the store."""
        for name, _ in self._entries():
            with self.reached():
                self._file_system.cp_file(f"{self._path}/{name}", f"{target._path}/{name}")

    def children(self) -> list["UrlPath"]:
        """What is in the folder now, by name."""
        return [self / name for name, _ in self._entries()]

    def file_sizes(self) -> dict[str, int]:
        """Size in bytes of what is in the folder, by name."""
        return {name: entry["size"] or 0 for name, entry in self._entries()}

    def _entries(self) -> list[tuple[str, Any]]:
        self._forget()
        with self.reached():
            try:
                entries = self._file_system.ls(self._path, detail=True)
            except FileNotFoundError:
                return []
        # Some stores list the folder itself.
        inside = [entry for entry in entries if entry["name"].strip("/") != self._path.strip("/")]
        return sorted(((entry["name"].rstrip("/").rpartition("/")[2], entry) for entry in inside), key=lambda e: e[0])

    def _forget(self) -> None:
        # Other processes write there too.
        self._file_system.invalidate_cache()

    @contextlib.contextmanager
    def reached(self) -> Iterator[None]:
        """Turn whatever a store's library raises into one sentence; a file that is not there stays an OSError."""
        try:
            yield
        except (FileNotFoundError, UserError, RunFailure):
            raise
        except Exception as error:  # each store has errors of its own
            reason = " ".join(str(error).split()) or type(error).__name__
            if is_outage(error, was_reached=self._reach.has_answered):
                raise StorageOutage(
                    f"{self} cannot be reached for now: {reason}; run again to continue once it answers."
                ) from error
            raise UserError(
                f"{self} cannot be reached: {reason}; check the URL and the credentials, which come from the "
                "environment."
            ) from error
        self._reach.has_answered = True


CheckpointPath = Path | UrlPath


def is_url(text: str) -> bool:
    """Whether a place is named by a URL rather than by a local path."""
    return "://" in text


def locate(setting: str, place: str) -> CheckpointPath:
    """The folder that a local path or a URL names; ``file://`` is a local path.

    Args:
        setting: what to call the origin of the place in an error.
        place: path or URL, such as ``s3://bucket/prefix``.

    Raises:
        UserError: the URL carries credentials, or nothing here can reach such a store.
    """
    if not is_url(place):
        return Path(place)
    parts = urlsplit(place)
    if "@" in parts.netloc:
        raise UserError(
            f"{setting}={parts.scheme}://***@{parts.netloc.rpartition('@')[2]}: a URL must not carry credentials; take "
            "out what stands before the @, and set the store's own variables, such as AWS_ACCESS_KEY_ID."
        )
    if place.startswith("file://"):
        return Path(place.removeprefix("file://"))
    import fsspec

    try:
        file_system, path = fsspec.core.url_to_fs(place)
    except ImportError:
        package, extra = _EXTRAS.get(parts.scheme, ("a package of fsspec's", None))
        how = f"pip install 'shardline[{extra}]'" if extra else "see fsspec's list of file systems"
        raise UserError(f"{setting}={place} needs {package}, which is not installed: {how}.") from None
    except ValueError as error:
        raise UserError(f"{setting}={place}: {error}; s3:// is tested, and a path is a local folder.") from None
    return UrlPath(file_system, path, parts.scheme)


def list_folders(parent: CheckpointPath) -> list[CheckpointPath]:
    """What is in a folder, by name; nothing where there is no such folder."""
    if isinstance(parent, UrlPath):
        return list(parent.children())
    return [*sorted(parent.iterdir())] if parent.is_dir() else []


def file_size(file: CheckpointPath) -> int:
    """Size of a file in bytes.

    Raises:
        OSError: there is none, or a local one cannot be looked at.
    """
    return file.stat().st_size if isinstance(file, Path) else file.num_bytes()


def file_sizes(folder: CheckpointPath) -> dict[str, int]:
    """Size in bytes of each file in a folder by name, from one listing: a store answers each question slowly."""
    if isinstance(folder, UrlPath):
        return folder.file_sizes()
    sizes = {}
    for entry in os.scandir(folder):
        # One that is gone meanwhile, or leads nowhere, is not there.
        with contextlib.suppress(FileNotFoundError):
            sizes[entry.name] = entry.stat().st_size
    return sizes


def reaching(file: CheckpointPath) -> contextlib.AbstractContextManager[None]:
    """Within this, what goes wrong on the way to an object store says nothing of the file: no OSError comes of it."""
    return contextlib.nullcontext() if isinstance(file, Path) else file.reached()


def make_folder(folder: CheckpointPath) -> None:
    """Create a folder and those above it; object stores have none."""
    if isinstance(folder, Path):
        folder.mkdir(parents=True, exist_ok=True)


def remove_file(file: CheckpointPath) -> None:
    """Delete a file, if it is there."""
    if isinstance(file, Path):
        file.unlink(missing_ok=True)
    else:
        file.unlink()


def write_whole(file: CheckpointPath, contents: bytes) -> None:
    """Write a small file so that it is either complete or not there, also after a crash."""
    if isinstance(file, UrlPath):
        file.write_bytes(contents)
        return
    write_atomically(file, contents, has_one_writer=True)


@contextlib.contextmanager
def writing(file: CheckpointPath) -> Iterator[BinaryIO]:
    """A new file to write to; it is on the disk, or in the store, when the block ends."""
    if isinstance(file, UrlPath):
        with file.reached(), file.open("wb") as opened:
            yield opened
        return
    with file.open("wb", buffering=0) as opened:
        yield opened
        os.fsync(opened.fileno())


def sync_names(folder: CheckpointPath) -> None:
    """Make the names in a local folder durable."""
    if isinstance(folder, Path):
        sync_folder(folder)
