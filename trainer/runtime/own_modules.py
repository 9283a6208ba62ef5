"""Modules of the user's own, from a folder that a setting names or from what is installed."""

import importlib
import os
import sys
from contextvars import ContextVar
from pathlib import Path
from types import ModuleType
from typing import Any

from sharding.ranks.errors import UserError

_INSTALLED = {"site-packages", "dist-packages"}
_imported_for: ContextVar[str] = ContextVar("imported_for", default="")


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
    importing = _imported_for.set(f"{setting}={name}")
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
    finally:
        _imported_for.reset(importing)
    return getattr(module, object_name)


def refuse_within_import(what: str) -> None:
    """Assert that no module of the user's own is being imported for what is in it.

    Raises:
        UserError: it is, and would begin something else by that.
    """
    if name := _imported_for.get():
        raise UserError(
            f"{what} was called while its module was imported for {name}; put the call under "
            'if __name__ == "__main__":.'
        )


def name_own(thing: object, argument: str) -> tuple[str, str | None]:
    """Under which name a class or function of the user's own is found again, by this process and by others.

    Args:
        thing: the class or function.
        argument: what it was given as, to speak of.

    Returns:
        ``module:object``, and the folder in which the module lies; None where it is installed.

    Raises:
        UserError: nothing could find it again.
    """
    kind = f"{argument}={thing!r}"
    name, module_name = getattr(thing, "__qualname__", None), getattr(thing, "__module__", None)
    if not callable(thing) or name is None or module_name is None:
        raise UserError(
            f"{kind} is an object, and how it was made could not be written into the run's configuration; give the "
            "class or function that makes it, and what that is called with by the configuration."
        )
    module = sys.modules.get(module_name)
    if module is None or getattr(module, name, None) is not thing:
        raise UserError(
            f"{kind} is not found as {name} of {module_name}, so that nothing could find it again when the run "
            "continues; define it at the top of a module, under its own name."
        )
    file = getattr(module, "__file__", None)
    if file is None:
        raise UserError(
            f"{kind} was written at a prompt or in a notebook, where nothing could find it again when the run "
            "continues; put it into a file, and import it from there."
        )
    if module_name == "__main__":
        module_name = _name_of_script(module, Path(file), kind)
    path = Path(file).absolute()
    folder = path.parents[module_name.count(".") + (path.name == "__init__.py")]
    return f"{module_name}:{name}", None if _is_installed(folder) else str(folder)


def _name_of_script(script: ModuleType, file: Path, kind: str) -> str:
    """The name under which others import this process's script, which is its name here as well from now on."""
    name = script.__spec__.name if script.__spec__ is not None else file.stem
    if script.__spec__ is None and (file.suffix != ".py" or "." in name):
        raise UserError(f"{kind} is in {file}, which cannot be imported; call the file NAME.py.")
    if sys.modules.setdefault(name, script) is not script:
        raise UserError(
            f"{kind} is in {file}, but a module {name} is there already, from "
            f"{getattr(sys.modules[name], '__file__', None) or 'the interpreter'}; call the file otherwise."
        )
    return name


def _is_installed(folder: Path) -> bool:
    """Whether a folder is searched for modules whatever a run says."""
    always = (Path(__file__).resolve().parents[2], Path(os.__file__).resolve().parent)
    return folder.resolve() in always or not _INSTALLED.isdisjoint(folder.parts)


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
