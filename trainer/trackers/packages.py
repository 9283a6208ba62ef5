"""Packages that trackers need and that an installation need not have."""

from importlib.util import find_spec
from typing import TYPE_CHECKING

from sharding.errors import UserError

if TYPE_CHECKING:
    from trainer.trackers.config import TrackingConfig

INSTALL_HINT = "pip install 'shardline[tracking]'"


def check_packages(tracking: "TrackingConfig") -> None:
    """Check that what the enabled trackers need is installed; imports nothing.

    Raises:
        UserError: a package is missing.
    """
    for name, section in (("tensorboard", tracking.tensorboard), ("trackio", tracking.trackio)):
        if section.enabled and find_spec(name) is None:
            raise UserError(
                f"tracking.{name}.enabled=true needs the package {name}, which is not installed; "
                f"{INSTALL_HINT}, or set it to false."
            )
