"""The embedded corpus: the source files of the running interpreter's own standard library."""

import os
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

NUM_PACKAGES = 12
"""Packages that passages are from: those with the most files."""

_PASSAGE_CHARACTERS = 600
_MAX_PASSAGES_PER_FILE = 12
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


@dataclass(frozen=True)
class Passage:
    """A piece of a source file.

    Attributes:
        text: its 600 characters, the last one of a file has fewer.
        package: the package that the file belongs to.
        file: the file, from the library's folder.
        source_id: the same with the number of the passage.
    """

    text: str
    package: str
    file: str
    source_id: str


def stdlib_passages() -> Iterator[Passage]:
    """Passages of the largest packages, at most 12 of a file: what a classifier of texts can be tried on."""
    files = [(path, path.relative_to(stdlib_folder())) for path in stdlib_files()]
    counts = Counter(name.parts[0] for _, name in files if len(name.parts) > 1)
    # Of equally many files the name decides, so that the choice is the same everywhere.
    packages = sorted(counts, key=lambda package: (-counts[package], package))[:NUM_PACKAGES]
    for path, name in files:
        if len(name.parts) > 1 and name.parts[0] in packages:
            text = path.read_text(encoding="utf-8", errors="replace")
            starts = range(0, len(text), _PASSAGE_CHARACTERS)[:_MAX_PASSAGES_PER_FILE]
            for number, start in enumerate(starts):
                passage = text[start : start + _PASSAGE_CHARACTERS]
                yield Passage(passage, name.parts[0], str(name), f"{name}#{number}")


def _belongs(name: str) -> bool:
    return name not in _LEFT_OUT and not name.startswith("test")
