"""The embedded corpus: the source files of the running interpreter's own standard library."""

import sysconfig
from pathlib import Path

_LEFT_OUT = {"site-packages", "dist-packages", "__pycache__"}


def stdlib_folder() -> Path:
    """Where the standard library lies."""
    return Path(sysconfig.get_paths()["stdlib"])


def stdlib_files() -> list[Path]:
    """Its Python files in sorted order, without installed packages and without tests."""
    root = stdlib_folder()
    return sorted(path for path in root.rglob("*.py") if _belongs(path.relative_to(root)))


def _belongs(path: Path) -> bool:
    return not any(part in _LEFT_OUT or part.startswith("test") for part in path.parts)
