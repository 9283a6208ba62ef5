"""What the commands do with their arguments before they use them."""

from pathlib import Path
from typing import Any

from trainer.config.expansion import expand_argument


def expanded(value: Any) -> Any:
    """A path, several, or none, as typer read them, with ``~`` and ``$VARIABLE`` replaced.

    A shell does it too, but not within quotes, and not behind ``--option=``.

    Raises:
        UserError: a variable is not set.
    """
    if isinstance(value, list):
        return [expanded(item) for item in value]
    if isinstance(value, Path):
        return Path(expand_argument(str(value)))
    return value if value is None else expand_argument(value)
