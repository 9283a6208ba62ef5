"""The embedded corpus: the source files of the running interpreter's own standard library."""

import os
import sysconfig
from pathlib import Path

_LEFT_OUT = {"site-packages", "dist-packages", "__pycache__"}


def stdlib_folder() -> Path:
    """Where the standard library lies."""
    return Path(sysconfig.get_paths()["stdlib"])


def stdlib_files() -> list[Path]:
    """Its Python files in sorted order, without installed packages and without tests."""
    files = []
    for folder, folders, names in os.walk(stdlib_folder()):
        # Not to be walked through: as a rule there are many times more files in them.
        folders[:] = [name for name in folders if _belongs(name)]
        files += [Path(folder, name) for name in names if name.endswith(".py") and _belongs(name)]
    return sorted(files)


def _belongs(name: str) -> bool:
    return name not in _LEFT_OUT and not name.startswith("test")
