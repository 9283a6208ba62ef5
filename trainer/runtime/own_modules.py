"""Modules of the user's own, from a folder that a setting names or from what is installed."""

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from sharding.ranks.errors import UserError


def import_own(name: str, setting: str, folder: str | None) -> Any:
    """What ``module:object`` names.

    Args:
        name: the module and what is in it.
        setting: the setting that names it, to speak of; its section has a setting ``folder``.
        folder: where the module lies, and what it imports from beside it; None where it is installed.

    Raises:
        UserError: there is no such module, or it has no such object.
    """
    module_name, _, object_name = name.partition(":")
    try:
        module = _import(module_name, folder)
        if not hasattr(module, object_name):
            raise ImportError(f"module {module_name!r} has no {object_name!r}")
    except ImportError as error:
        key = f"{setting.rpartition('.')[0]}.folder"
        place = f"no {key} is set" if folder is None else f"{key}={folder}"
        raise UserError(
            f"{setting}={name} cannot be imported: {error}; check the module and what it names, and where the module "
            f"lies ({place}; else it must be installed or on PYTHONPATH, and the working folder does not count)."
        ) from None
    return getattr(module, object_name)


def _import(name: str, folder: str | None) -> ModuleType:
    if folder is None:
        return importlib.import_module(name)
    place = str(Path(folder).absolute())
    # Last, so that nothing in it is taken in place of a library.
    if place not in sys.path:
        sys.path.append(place)
    module = importlib.import_module(name)
    if not _lies_in(module, Path(place)):
        raise ImportError(f"the module {name} is taken from {module.__file__ or 'elsewhere'}, so rename yours")
    return module


def _lies_in(module: ModuleType, folder: Path) -> bool:
    return module.__file__ is not None and Path(module.__file__).resolve().is_relative_to(folder.resolve())
