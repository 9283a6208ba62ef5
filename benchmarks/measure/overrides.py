"""The user's ``key=value`` changes to a benchmark's run."""

from collections.abc import Collection, Sequence

from sharding.ranks.errors import UserError
from trainer.config.earlier_spellings import present_name


def refuse(overrides: Sequence[str], settings: Collection[str], reason: str) -> None:
    """Refuse changes of settings that a benchmark decides itself, and would else change back in silence.

    Args:
        overrides: the changes.
        settings: names of the settings.
        reason: who decides, and what to do instead.

    Raises:
        UserError: one of them is changed.
    """
    for override in overrides:
        if present_name(override.partition("=")[0]) in settings:
            raise UserError(f"{override}: {reason}")
