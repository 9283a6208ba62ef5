"""Shardline's other packages, taken from where this one lies, whatever else bears their names."""

import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path

_HOME = Path(__file__).resolve().parent.parent
_NAMES = ("sharding", "trainer")


def load_own_packages() -> None:
    """Load them from beside this package: a script's own folder, which Python searches first, may have such names too.

    What is loaded here is found before any file, so from now on these names mean Shardline's everywhere in the process.

    Raises:
        ImportError: another module of such a name is loaded already, or there is none beside this package.
    """
    for name in _NAMES:
        loaded = sys.modules.get(name)
        if loaded is None:
            spec = PathFinder.find_spec(name, [str(_HOME)])
            if spec is None or spec.loader is None:
                raise ImportError(f"shardline needs its package {name} beside it, in {_HOME}; install it anew.")
            loaded = module_from_spec(spec)
            sys.modules[name] = loaded
            spec.loader.exec_module(loaded)
        place = getattr(loaded, "__file__", None)
        if place is None or Path(place).resolve() != _HOME / name / "__init__.py":
            raise ImportError(
                f"shardline needs its own package {name}, but a module of this name is loaded already, from "
                f"{place or 'a folder without __init__.py'}; call that one otherwise."
            )
