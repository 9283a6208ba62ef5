"""Section `stages`: what a stage says of itself."""

from typing import Any

from pydantic import Field, field_serializer

from sharding.strict_model import StrictModel
from trainer.config.data import DataConfig
from trainer.config.schedule import ScheduleConfig
from trainer.config.sections import BatchConfig


class StageConfig(StrictModel):
    """A part of a run: its length, and what in it is otherwise than the run's sections say."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the stage in logs and errors; letters, digits, `.`, `_` and `-`."""

    steps: int | None = Field(default=None, ge=1)
    """Optimizer steps of the stage; exactly one of this and tokens must be set."""

    tokens: int | None = Field(default=None, ge=1)
    """Tokens of the stage, global_size x sequence_length of them a step; the last step is whole."""

    lr: float | None = Field(default=None, gt=0.0)
    """Peak learning rate of the stage in place of `optimizer.lr`."""

    data: DataConfig = DataConfig()
    """Settings of `data` that are the stage's own; the others are the run's, but those of its source where the stage
    names `source` or `mixture`."""

    schedule: ScheduleConfig | None = None
    """A learning-rate schedule over the stage's own steps, `{}` for one as the run's; if not set, the stage has its
    part of the run's schedule, which is over the steps of all stages."""

    batch: BatchConfig = BatchConfig()
    """Settings of `batch` that are the stage's own; the others are the run's."""

    @field_serializer("data", "schedule", "batch")
    def _own_alone(self, section: StrictModel | None) -> Any:
        """What the stage says itself: written down whole, it would hide what the run's section is changed to."""
        return None if section is None else section.model_dump(mode="json", exclude_unset=True)

    def num_steps(self, batch: BatchConfig, data: DataConfig) -> int:
        """Optimizer steps of the stage in a run with these sections."""
        if self.steps is not None:
            return self.steps
        global_size = (self.batch if "global_size" in self.batch.model_fields_set else batch).global_size
        length = (self.data if "sequence_length" in self.data.model_fields_set else data).sequence_length
        return -(-(self.tokens or 0) // (global_size * length))
