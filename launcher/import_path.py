"""Where the processes that we start import from: our packages and what is installed, never the folder they start in.

``python -m`` looks into the working folder first. That may be a run that somebody else has made, with a ``yaml.py``.
"""

import os
import site
import sys
from collections.abc import Mapping
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent


def import_variables(environment: Mapping[str, str], root: Path = _ROOT) -> dict[str, str]:
    """What to add to a child's environment, and so to that of all its children.

    Args:
        environment: the child's; folders that the user names in PYTHONPATH stay.
        root: folder in which our packages lie side by side.
    """
    # An empty entry, what $PYTHONPATH:/my/modules begins with where it was not set, means the working folder.
    folders = [folder for folder in environment.get("PYTHONPATH", "").split(os.pathsep) if folder]
    # A checkout that is not installed is found by this alone; what is installed stays behind the standard library.
    if str(root) not in folders and root not in _installation_folders():
        folders.insert(0, str(root))
    path = {"PYTHONPATH": os.pathsep.join(folders)} if folders or "PYTHONPATH" in environment else {}
    return {"PYTHONSAFEPATH": "1", **path}


def module_command(module: str, *arguments: str) -> list[str]:
    """Argv that runs one of our modules, to be started with ``import_variables``."""
    return [sys.executable, "-P", "-m", module, *arguments]


def _installation_folders() -> set[Path]:
    return {Path(folder).resolve() for folder in (*site.getsitepackages(), site.getusersitepackages())}
