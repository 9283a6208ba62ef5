"""Modules of the user's own that a run imports by name, and what they import beside them."""

import ast
import contextlib
import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

from sharding.ranks.errors import UserError

_INSTALLED = {"site-packages", "dist-packages"}
# Of a package's other files: tables that code reads, not checkpoints that lie about.
_LARGEST_BYTES = 2**20


def copy_modules(name: str, folder: Path, home: str | None, setting: str) -> None:
    """Copy a module, or the package that it is part of, and those beside it that it imports.

    What is installed stays where it is: a job finds it there, and an installation does not change under edits.

    Args:
        name: the module, such as ``my.tasks``.
        folder: where they go, beside Shardline's own packages.
        home: the section's ``folder``, where modules are that are not on PYTHONPATH.
        setting: which names the module.

    Raises:
        UserError: there is no such module.
    """
    waiting, seen = [name.partition(".")[0]], set(_names_in(folder))
    while waiting:
        top = waiting.pop()
        if top in seen:
            continue
        seen.add(top)
        # Last, as where it runs: nothing beside a configuration is taken in place of a library.
        spec = PathFinder.find_spec(top, [*sys.path, *([] if home is None else [home])])
        if spec is None:
            # An editable installation is found by its own finder alone.
            with contextlib.suppress(ImportError, ValueError):
                spec = importlib.util.find_spec(top)
        if spec is None and top == name.partition(".")[0]:
            place = f"in {setting.partition('.')[0]}.folder={home} or " if home is not None else ""
            raise UserError(f"{setting}={name}:...: there is no module {top} {place}on PYTHONPATH.")
        for source in _sources(spec):
            target = folder / source.relative_to(_home(spec) or source.parent)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)
            waiting += _imports(source) if source.suffix == ".py" else []


def _names_in(folder: Path) -> Iterator[str]:
    return (path.stem for path in folder.iterdir())


def _home(spec: ModuleSpec | None) -> Path | None:
    """The folder in which a module or package lies; None for what is built in."""
    if spec is None:
        return None
    if spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations))).parent
    return Path(spec.origin).parent if spec.origin and spec.has_location else None


def _sources(spec: ModuleSpec | None) -> list[Path]:
    """A module's file, or those of a package, large ones left out; none of what is installed."""
    home = _home(spec)
    if spec is None or home is None or home.is_relative_to(Path(os.__file__).parent) or set(home.parts) & _INSTALLED:
        return []
    if not spec.submodule_search_locations:
        return [Path(spec.origin)] if spec.origin and spec.origin.endswith(".py") else []
    files = (path for path in (home / spec.name).rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return [path for path in files if path.suffix == ".py" or path.stat().st_size <= _LARGEST_BYTES]


def _imports(file: Path) -> Iterator[str]:
    """Top-level names of what a file imports, wherever in it."""
    try:
        tree = ast.parse(file.read_bytes())
    except SyntaxError as error:
        raise UserError(f"{file}: line {error.lineno}: {error.msg}; mend it, and submit again.") from None
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]
