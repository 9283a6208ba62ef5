"""Configuration of experiment trackers."""

from importlib.util import find_spec
from typing import Annotated, Literal

from pydantic import Field

from sharding.ranks.errors import UserError
from sharding.strict_model import StrictModel


class WandbConfig(StrictModel):
    """Weights & Biases."""

    project: str = "shardline"
    """Project that runs appear under."""

    entity: str | None = None
    """Team or user that owns the project; the key's default if not set."""

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """`auto` is online where a key is set and offline elsewhere; `disabled` turns wandb off."""

    tags: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Tags of the run."""

    group: str | None = None
    """Group that wandb shows the run in, such as the name of a sweep."""

    notes: str | None = None
    """Text about the run, for people."""

    artifacts: bool = False
    """Keep configuration, provenance, metrics and the newest checkpoint's manifest as an artifact at the end."""


class TensorBoardConfig(StrictModel):
    """TensorBoard; event files go to `tensorboard` in the run's folder."""

    enabled: bool = False
    """Write event files; needs the package tensorboard."""


class TrackioConfig(StrictModel):
    """trackio, a dashboard on this machine; data goes to `$TRACKIO_DIR`, else to `trackio` in the run's folder."""

    enabled: bool = False
    """Write to a trackio project; needs the package trackio."""

    project: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")] = "shardline"
    """Project that runs appear under; letters, digits, `_` and `-`."""


class TrackingConfig(StrictModel):
    """Experiment trackers; metrics.jsonl is always written."""

    wandb: WandbConfig = WandbConfig()
    """Weights & Biases settings."""

    tensorboard: TensorBoardConfig = TensorBoardConfig()
    """TensorBoard settings."""

    trackio: TrackioConfig = TrackioConfig()
    """Trackio settings."""


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
