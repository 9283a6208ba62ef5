"""Exceptions that end a run with one sentence instead of a traceback."""

import functools
from collections.abc import Callable
from typing import ParamSpec

from sharding.ranks.quiet_end import ends_quietly
from sharding.ranks.sentences import print_error

EXIT_FINISHED = 0
EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_STOPPED = 75


class UserError(Exception):
    """The user's input is wrong: one sentence with the setting, its value, the arithmetic and the remedy.

    Entry points print the sentence without a traceback and exit with ``EXIT_BAD_INPUT``.
    """


class AgreedError(UserError):
    """One that all ranks have come to alike, so that they can still do together what is left to do."""


class RunFailure(Exception):
    """The run cannot go on, and one sentence says why and what to do; exits with ``EXIT_FAILED``."""


class NonFiniteFailure(RunFailure):
    """Too many steps in a row had a loss or a gradient that was not finite."""


_Parameters = ParamSpec("_Parameters")


def ends_with_a_sentence(main: Callable[_Parameters, int]) -> Callable[_Parameters, int]:
    """Make an entry point print the sentence of a UserError or RunFailure and return its exit status.

    It exits with one line where a person interrupts it, and with none where what it prints is no longer read.
    """

    @functools.wraps(main)
    def run(*args: _Parameters.args, **kwargs: _Parameters.kwargs) -> int:
        try:
            with ends_quietly():
                return main(*args, **kwargs)
        except (UserError, RunFailure) as error:
            print_error(str(error))
            return EXIT_BAD_INPUT if isinstance(error, UserError) else EXIT_FAILED

    return run
