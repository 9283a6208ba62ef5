"""Small files that are either there complete or not there."""

import os
import tempfile
from pathlib import Path


def write_atomically(path: Path, text: str | bytes, *, owner_only: bool = False, has_one_writer: bool = False) -> None:
    """Write a file so that a reader sees either the old contents or the new, even across a crash.

    Args:
        path: the file.
        text: its contents.
        owner_only: whether nobody else may read it, whatever the umask allows.
        has_one_writer: whether nobody else writes it at the same time. Then what a crash leaves behind has one name, so
            that the next write takes it over, and the file's own name is on the disk when this returns.
    """
    temporary = _write_beside(path, text, owner_only=owner_only, has_one_writer=has_one_writer)
    try:
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if has_one_writer:
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def create_once(path: Path, text: str) -> bool:
    """Write a file unless it exists; returns whether this call created it. Complete from the first moment."""
    temporary = _write_beside(path, text)
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError:
        # A file system without hard links: exclusive all the same, but not complete from the first moment.
        return _create_exclusively(path, text)
    finally:
        temporary.unlink(missing_ok=True)
    return True


def _create_exclusively(path: Path, text: str) -> bool:
    try:
        with path.open("x") as file:
            file.write(text)
    except FileExistsError:
        return False
    return True


def _write_beside(path: Path, text: str | bytes, *, owner_only: bool = False, has_one_writer: bool = False) -> Path:
    """A temporary file in the same folder; of several writers, on any node that shares the folder, each has its own."""
    if has_one_writer:
        temporary = path.with_name(f".{path.name}.partial")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    else:
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        temporary = Path(name)
    try:
        with os.fdopen(descriptor, "w" if isinstance(text, str) else "wb") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files that nobody else can read; give this one what the umask allows.
        if not owner_only:
            temporary.chmod(0o666 & ~umask())
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


def umask() -> int:
    """The permission bits that new files of this process do not get."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("Umask:"):
            return int(line.split()[1], 8)
    return 0o022
