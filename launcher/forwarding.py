"""Commands whose work needs torch: read here as ``trainer.commands`` declares them, and done by another process."""

import os
import sys
from typing import Any, NoReturn

import typer
from typer.core import TyperCommand

from launcher.import_path import import_variables, module_command


class Forwarded(TyperCommand):
    """A command that is declared in ``trainer.commands``: help and mistakes come at once, the work is its module's.

    The module reads the same arguments by the same declaration.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the arguments, and keep them as they were written."""
        ctx.meta[__name__] = list(args)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> None:
        """Have the module do the work."""
        assert self.callback is not None
        become(self.callback.__module__, *ctx.meta[__name__])


class Doctor(Forwarded):
    """The doctor, whose ranks are started here where no launcher has started this process."""

    def invoke(self, ctx: Any) -> None:
        """Examine, and end with the exit status."""
        from launcher.doctor import run_doctor

        raise typer.Exit(run_doctor(ctx.meta[__name__], ctx.params["nproc_per_node"]))


def become(module: str, *arguments: str) -> NoReturn:
    """Replace this process by a module that loads torch; the launcher itself stays light."""
    sys.stdout.flush()
    # Through another module, for a person may interrupt it while it imports torch.
    command = module_command("sharding.ranks.quiet_end", module, *arguments)
    environment = {**os.environ, **import_variables(os.environ)}
    os.execve(command[0], command, environment)  # noqa: S606 - no shell is what we want
