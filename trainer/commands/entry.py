"""From a command's one declaration, a function with typer's annotations, to ``python -m trainer.commands.NAME``."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import typer

from sharding.ranks.errors import ends_with_a_sentence
from trainer.commands.arguments import HELP_OPTIONS


def entry(command: Callable[..., int]) -> Callable[[Sequence[str]], int]:
    """What a command's module runs: parses arguments as the command declares them, and returns its exit status.

    Args:
        command: declares arguments, options and help, and returns the exit status. Importing its module loads no torch,
            since the launcher reads the declaration there: what needs more is imported in its body.
    """

    # Within typer, which would make statuses of its own of an interruption and of a reader that has gone.
    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> NoReturn:
        raise typer.Exit(ends_with_a_sentence(command)(*args, **kwargs))

    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(context_settings=HELP_OPTIONS)(run)

    @ends_with_a_sentence
    def main(arguments: Sequence[str]) -> int:
        try:
            app(list(arguments))
        except SystemExit as end:
            return int(end.code or 0)
        raise AssertionError("typer ends with an exit status")

    return main
