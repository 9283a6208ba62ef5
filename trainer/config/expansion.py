"""``~`` and ``$VARIABLE`` in what names a file or folder, as a shell would have it. Imports no torch."""

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sharding.ranks.errors import UserError

PATH_SETTINGS = (
    *("output_dir", "task.folder", "model.pretrained", "model.folder", "data.folder"),
    *("data.paths", "data.validation_paths", "data.test_paths", "data.mixture.paths"),
    "evaluation.sets.paths",
    *("stages.data.paths", "stages.data.validation_paths", "stages.data.mixture.paths", "stages.data.chat_template"),
    *("data.tokenizer", "data.chat_template", "data.cache_dir"),
    *("checkpoint.storage", "checkpoint.from", "distill.teacher", "parallel.nvme_path"),
)
"""Settings in which they are replaced; each holds a text or several."""

_VARIABLE = re.compile(r"\$(?:\$|(?P<name>[A-Za-z_]\w*)|\{(?P<braced>[^{}]*)\})")


def expand(text: str, key: str, environment: Mapping[str, str] = os.environ) -> str:
    """A path with a user's folder in place of ``~`` or ``~NAME`` at its start, variables replaced; ``$$`` is a ``$``.

    Args:
        text: what a person wrote.
        key: what to call it in an error.
        environment: the variables.

    Raises:
        UserError: a variable is not set or empty, or there is no such user.
    """

    def value_of(match: re.Match[str]) -> str:
        if match[0] == "$$":
            return "$"
        name = match["name"] if match["braced"] is None else match["braced"]
        if not environment.get(name):
            raise UserError(
                f"{key}={text}: the variable {name} is not set or empty here; set it, or write $$ for a dollar sign."
            )
        return environment[name]

    # Only what was written can be a person's folder, not what a variable holds.
    home = os.path.expanduser(text.partition("/")[0])
    if text.startswith("~") and home.startswith("~"):
        raise UserError(f"{key}={text}: there is no user {home[1:]}; write ./{text} for a folder of that name.")
    rest = text[len(text.partition("/")[0]) :] if text.startswith("~") else text
    return (home if text.startswith("~") else "") + _VARIABLE.sub(value_of, rest)


def expand_settings(values: dict[str, Any]) -> None:
    """Replace them in place in nested settings as YAML has them.

    Raises:
        UserError: see ``expand``.
    """
    _apply(values, lambda key, text: expand(text, key))


def escape_settings(values: dict[str, Any]) -> None:
    """Write nested settings, in place, so that ``expand_settings`` gives them back."""
    _apply(values, lambda _, text: f"./{text}".replace("$", "$$") if text.startswith("~") else text.replace("$", "$$"))


def expand_argument(text: str) -> str:
    """A path on the command line, which a shell has expanded already unless it was quoted or behind ``--option=``.

    Raises:
        UserError: see ``expand``.
    """
    return text if Path(text).exists() else expand(text, "argument")


def _apply(values: dict[str, Any], change: Callable[[str, str], str]) -> None:
    for key in PATH_SETTINGS:
        *parents, leaf = key.split(".")
        sections = [values]
        for parent in parents:
            found = [section.get(parent) for section in sections]
            # A mixture is a list of sections; what is neither is for validation to name.
            lists = [inner if isinstance(inner, list) else [inner] for inner in found]
            sections = [inner for several in lists for inner in several if isinstance(inner, dict)]
        for section in sections:
            value = section.get(leaf)
            if isinstance(value, str):
                section[leaf] = change(key, value)
            elif isinstance(value, list):
                section[leaf] = [change(key, item) if isinstance(item, str) else item for item in value]
