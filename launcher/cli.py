"""The ``shardline`` command: its entry, which makes sure first that it runs Shardline's own code."""

import importlib.util
import os
import sys
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import NoReturn

_PACKAGES = ("sharding", "trainer")


def main() -> NoReturn:
    """Run a command and exit with its status; a mistake of the user is one sentence and exit status 2."""
    # Ranks are started with -m, so a package in the working folder comes before an installed one for them.
    sentence = find_intruder(Path(__file__).resolve().parent.parent, Path.cwd())
    if sentence is not None:
        print(f"error: {sentence}", file=sys.stderr)
        sys.exit(2)

    # Only now, for they would take the intruder's modules.
    from launcher.commands import app
    from sharding.errors import EXIT_BAD_INPUT, EXIT_FAILED, RunFailure, UserError

    try:
        app(prog_name="shardline")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
    except RunFailure as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_FAILED)
    sys.exit(0)


def find_intruder(home: Path, working_folder: Path) -> str | None:
    """A sentence about a package that a rank would import in place of Shardline's own; None where there is none.

    Args:
        home: folder in which the packages lie side by side.
        working_folder: folder in which ranks are started.
    """
    for name in _PACKAGES:
        spec = PathFinder.find_spec(name, [os.fspath(working_folder)])
        # A mere folder of that name, without code, gives way to an installed package.
        if spec is None or spec.origin is None:
            spec = importlib.util.find_spec(name)
        origin = _origin(spec)
        if origin != home / name / "__init__.py":
            return (
                f"the package {name} would be taken from {origin or 'nowhere'}, not from {home / name}; start from "
                "another folder, or uninstall or rename the other package."
            )
    return None


def _origin(spec: ModuleSpec | None) -> Path | None:
    return Path(spec.origin).resolve() if spec is not None and spec.origin is not None else None


if __name__ == "__main__":
    main()
