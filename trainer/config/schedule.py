"""Section `schedule`, and the rules among its settings."""

import math
from fractions import Fraction
from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field

from sharding.ranks.errors import UserError
from sharding.strict_model import UNSET, OnlyWith, StrictModel

CURVES_WITH_END = ("linear", "cosine", "wsd", "polynomial")


class ScheduleConfig(StrictModel):
    """Learning rate over steps: linear warm-up, then the named curve."""

    name: Literal["constant", "linear", "cosine", "wsd", "polynomial", "inverse_sqrt", "exponential", "step"] = "cosine"
    """Curve after warm-up; `wsd` is warm-up, stable, linear decay; the last three and `constant` have no end."""

    warmup_steps: int = Field(default=0, ge=0)
    """Steps over which the rate rises linearly to its peak."""

    warmup_fraction: Annotated[float, OnlyWith(warmup_steps=UNSET)] = Field(default=0.0, ge=0.0, le=1.0)
    """Share of the schedule's steps, those of total_steps or of the run as it was first started, to warm up over, in
    place of warmup_steps."""

    total_steps: Annotated[int, OnlyWith(name=CURVES_WITH_END)] = Field(default=0, ge=0)
    """Step at which a curve with an end ends; 0 means the number of steps the run was first started with."""

    decay_steps: Annotated[int, OnlyWith(name="wsd")] = Field(default=0, ge=0)
    """Length in steps of the final decay under `wsd`; 0 means a tenth of total_steps."""

    final_lr_ratio: Annotated[float, OnlyWith(name=(*CURVES_WITH_END, "inverse_sqrt", "exponential", "step"))] = Field(
        default=0.1, ge=0.0, le=1.0
    )
    """Lowest rate after warm-up, as a share of the peak: where a curve ends, or what one without an end stops at."""

    power: Annotated[float, OnlyWith(name="polynomial")] = Field(default=1.0, gt=0.0)
    """Exponent of the `polynomial` curve in the share of steps that remains."""

    decay_rate: Annotated[float, OnlyWith(name=("exponential", "step"))] = Field(default=0.5, gt=0.0, lt=1.0)
    """Factor of each decay under `exponential` and `step`."""

    decay_every_steps: Annotated[int, OnlyWith(name=("exponential", "step"))] = Field(default=0, ge=0)
    """Steps after warm-up in which the rate falls by decay_rate, smoothly (`exponential`) or at their end (`step`)."""

    milestones: Annotated[tuple[int, ...], Field(strict=False), OnlyWith(name="step")] = ()
    """Steps after which the rate falls by decay_rate under `step`, in place of decay_every_steps."""


def num_warmup_steps(schedule: ScheduleConfig, total_steps: int) -> int:
    """Steps of warm-up in a schedule of so many steps."""
    # As it was written: a binary fraction may be a little more, which could make a step of its own.
    return schedule.warmup_steps or math.ceil(Fraction(str(schedule.warmup_fraction)) * total_steps)


def validate_curve(schedule: ScheduleConfig, warmup_steps: int) -> None:
    """Check that the curve has what it needs.

    Args:
        schedule: the curve.
        warmup_steps: steps of its warm-up.

    Raises:
        UserError: it has not.
    """
    name = schedule.name
    if name == "exponential" and not schedule.decay_every_steps:
        raise UserError(
            "schedule.name=exponential needs schedule.decay_every_steps, which is 0; set it to the number of steps "
            f"in which the rate falls to {schedule.decay_rate:g} of what it was."
        )
    if name == "step" and bool(schedule.decay_every_steps) == bool(schedule.milestones):
        raise UserError(
            f"schedule.name=step takes schedule.decay_every_steps={schedule.decay_every_steps} or "
            f"schedule.milestones={list(schedule.milestones)}: set exactly one of them."
        )
    bounds = (max(warmup_steps, 1), *schedule.milestones)
    if any(later < earlier + (index > 0) for index, (earlier, later) in enumerate(pairwise(bounds))):
        raise UserError(
            f"schedule.milestones={list(schedule.milestones)} must rise, from the {warmup_steps} "
            "steps of warm-up (and 1) on; put them in order, each step once."
        )
