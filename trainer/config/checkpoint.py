"""Configuration of checkpoints and of what a run starts from."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, ConfigDict, Field

from sharding.ranks.errors import UserError
from sharding.strict_model import SET, OnlyWith, StrictModel
from trainer.config.schedule import ScheduleConfig

CHANGEABLE = ("optimizer.lr", "optimizer.weight_decay", "schedule", "model.attention")
"""Settings and sections that a run may change when it is continued, if ``checkpoint.allow_changes`` lists them."""

# One key may stand without a list.
Keys = Annotated[
    tuple[str, ...],
    BeforeValidator(lambda keys: (keys,) if isinstance(keys, str) else keys),
    Field(strict=False),
]


class CheckpointConfig(StrictModel):
    """When state is saved, what is kept, and what a run continues from."""

    model_config = ConfigDict(populate_by_name=True, serialize_by_alias=True)

    every_steps: int = Field(default=0, ge=0)
    """Save after every this many steps; 0 means only at the end of the run."""

    storage: str | None = None
    """Folder or URL, such as `s3://bucket/prefix`, that checkpoints go to, in a folder by the run's name; `checkpoints`
    in the run's folder if not set. Credentials come from the environment."""

    asynchronous: bool = True
    """Copy the state and write the copy while training goes on; false has training wait for the write."""

    keep_last: int = Field(default=2, ge=0)
    """Number of newest checkpoints that are kept; 0 keeps all."""

    keep_every: int = Field(default=0, ge=0)
    """Keep for good each checkpoint whose step is a multiple of this; 0 means none."""

    keep_best: Annotated[
        int,
        OnlyWith({"checkpoint.keep_last": SET}, because="that keeps all"),
        OnlyWith({"data.validation_fraction": SET}, because="what is best is told by a held-out metric"),
    ] = Field(default=0, ge=0)
    """Keep also this many checkpoints whose step was evaluated with the best `evaluation.monitor`; 0 means none."""

    resume: Literal["auto", "never"] = "auto"
    """`auto` continues from the run folder's newest checkpoint; `never` refuses a folder that has one."""

    from_: str | None = Field(default=None, alias="from")
    """Another run to start from, `RUN_FOLDER` or `RUN_FOLDER@STEP`, or the URL of a folder of checkpoints;
    read only while this run has no checkpoint."""

    load: Annotated[Literal["all", "weights"], OnlyWith({"checkpoint.from": SET})] = "all"
    """With `from`: take everything (a fork) or the parameters alone (a warm start at step 0)."""

    allow_changes: Keys = ()
    """Settings that a continued run may change although they are frozen: `optimizer.lr`, `optimizer.weight_decay`,
    `schedule` or settings in it, `model.attention`. What changes is in the log and in `events.jsonl`."""


def validate_changes(checkpoint: CheckpointConfig) -> None:
    """Check that only what may change is allowed to.

    Raises:
        UserError: a key is none of these.
    """
    known = {*CHANGEABLE, *(f"schedule.{name}" for name in ScheduleConfig.model_fields)}
    for key in checkpoint.allow_changes:
        if key not in known:
            raise UserError(
                f"checkpoint.allow_changes={key}: a run may change {', '.join(CHANGEABLE[:-1])} (or a setting in it) "
                f"and {CHANGEABLE[-1]} alone; start another run with checkpoint.from for what else is to be different."
            )
