"""A folder that appears complete or not at all."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from sharding.ranks.errors import UserError
from trainer.files.atomic_files import umask


def refuse_contents(folder: Path) -> None:
    """Assert that a folder is new or empty.

    Raises:
        UserError: it is not.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--to {folder} is {'not empty' if folder.is_dir() else 'a file'}; name a new folder.")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder beside the one that is to be, which takes its name when all is written, and goes where that fails.

    Args:
        folder: the one that is to be; new or empty.

    Raises:
        UserError: it has contents, or cannot be written.
    """
    refuse_contents(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    except OSError as error:
        raise _not_writable(folder, error) from None
    try:
        yield work
        # mkdtemp made the folder private, and safetensors its files.
        for path in work.rglob("*"):
            path.chmod((0o777 if path.is_dir() else 0o666) & ~umask())
        work.chmod(0o777 & ~umask())
        if folder.exists():
            folder.rmdir()
        work.rename(folder)
    except BaseException as error:
        shutil.rmtree(work, ignore_errors=True)
        if isinstance(error, OSError | SafetensorError):
            raise _not_writable(folder, error) from None
        raise


def _not_writable(folder: Path, error: Exception) -> UserError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return UserError(f"--to {folder} cannot be written: {reason}; name another folder, or free some space.")
