"""Configuration of experiment trackers."""

from typing import Annotated, Literal

from pydantic import Field

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


class TrackingConfig(StrictModel):
    """Experiment trackers; metrics.jsonl is always written."""

    wandb: WandbConfig = WandbConfig()
    """Weights & Biases settings."""
