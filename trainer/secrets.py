"""Secrets stay in the environment: a setting that holds one is refused, since settings are written down and shown."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from sharding.errors import UserError

_SECRET_NAME = re.compile(r"(?i)(?:key|token|secret|passwd|password|credentials)$")
_SECRET_IN_URL = re.compile(r"(?i)^[a-z][a-z0-9+.-]*://[^/?#\s]*:[^/?#@\s]+@")
# Shorter ones are found in ordinary words.
_MIN_LENGTH = 8


def refuse_secrets(settings: Mapping[str, Any], environment: Mapping[str, str]) -> None:
    """Assert that no setting holds a secret of the environment, or a URL with a password.

    Raises:
        UserError: one does; the secret is not repeated.
    """
    secrets = _secrets(environment)
    for key, text in _texts(settings, ""):
        for name, value in secrets.items():
            if value in text:
                raise UserError(
                    f"{key} holds the value of {name}, and settings are written to the run's folder and shown; remove "
                    f"it there: what needs {name} reads it from the environment."
                )
        if _SECRET_IN_URL.match(text):
            raise UserError(
                f"{key} is a URL with a password, and settings are written to the run's folder and shown; take the "
                "password out, and give it by the environment or a credentials file."
            )


def blot_out(text: str, environment: Mapping[str, str]) -> str:
    """A text without the values of secrets in the environment."""
    for value in sorted(_secrets(environment).values(), key=len, reverse=True):
        text = text.replace(value, "***")
    return text


def _secrets(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables that hold a secret by their name: WANDB_API_KEY, HF_TOKEN, AWS_SECRET_ACCESS_KEY ..."""
    return {
        name: value for name, value in environment.items() if _SECRET_NAME.search(name) and len(value) >= _MIN_LENGTH
    }


def _texts(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """Every text in nested settings with its key."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            # A name can be a text of the user's too.
            yield key or "the top level", str(name)
            yield from _texts(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(inner, key)
