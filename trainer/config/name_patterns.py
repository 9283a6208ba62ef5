"""Shell patterns for whole names of parameters, and what to say of one that matches none; imports no torch."""

import difflib
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase


def matching_names(pattern: str, names: Iterable[str]) -> list[str]:
    """The names that a pattern (`*`, `?`, `[...]`) matches from end to end, in their order."""
    return [name for name in names if fnmatchcase(name, pattern)]


def without_match(setting: str, pattern: str, names: Sequence[str], kind: str = "parameter") -> str:
    """The sentence about a pattern that matches nothing.

    Args:
        setting: the pattern's key.
        pattern: what it is.
        names: what it could have matched.
        kind: what these are names of.
    """
    nearest = difflib.get_close_matches(pattern, names, n=3, cutoff=0.0)
    return (
        f"{setting}={pattern} matches no {kind}; the nearest names are {', '.join(nearest)}, and * stands for any "
        "characters."
    )
