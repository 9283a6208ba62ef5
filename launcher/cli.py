"""The ``shardline`` command: its entry, which makes sure first that it runs Shardline's own code."""

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import NoReturn

_PACKAGES = ("sharding", "trainer")


def main() -> NoReturn:
    """Run a command and exit with its status; a mistake of the user is one sentence and exit status 2."""
    sentence = find_intruder(Path(__file__).resolve().parent.parent)
    if sentence is not None:
        print(f"error: {sentence}", file=sys.stderr)
        sys.exit(2)

    # Only now, for it would take the intruder's modules.
    from sharding.ranks.quiet_end import ends_quietly

    with ends_quietly():
        _run()


def _run() -> NoReturn:
    from launcher.commands import app
    from sharding.ranks.errors import EXIT_BAD_INPUT, EXIT_FAILED, RunFailure, UserError
    from sharding.ranks.sentences import print_error

    try:
        app(prog_name="shardline")
    except SystemExit as end:
        # typer has made an exit status of it, by its version 1 or 130.
        if end.__context__ is not None and isinstance(end.__context__.__cause__, KeyboardInterrupt):
            raise end.__context__.__cause__ from None
        raise
    except UserError as error:
        print_error(str(error))
        sys.exit(EXIT_BAD_INPUT)
    except RunFailure as error:
        print_error(str(error))
        sys.exit(EXIT_FAILED)
    sys.exit(0)


def find_intruder(home: Path) -> str | None:
    """A sentence about a package that would be imported in place of Shardline's own; None where there is none.

    Args:
        home: folder in which the packages lie side by side.
    """
    for name in _PACKAGES:
        origin = _origin(importlib.util.find_spec(name))
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
