"""Sentences for a person on standard error, their first word in colour where a terminal shows it."""

import os
import sys

_RED, _YELLOW = "1;31", "33"


def print_error(sentence: str) -> None:
    """Say why a command ends."""
    print(f"{_marked('error:', _RED)} {sentence}", file=sys.stderr)


def print_warning(sentence: str) -> None:
    """Say what should not be overlooked."""
    print(f"{_marked('warning:', _YELLOW)} {sentence}", file=sys.stderr)


def _marked(word: str, colour: str) -> str:
    # As https://no-color.org has it: set to anything, it keeps colours away.
    is_plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or not sys.stderr.isatty()
    return word if is_plain else f"\x1b[{colour}m{word}\x1b[0m"
