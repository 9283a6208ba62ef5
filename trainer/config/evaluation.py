"""Rules of evaluation, and of what is judged by it: early stop and the best checkpoints; imports no torch."""

import math
from typing import TYPE_CHECKING

from sharding.ranks.errors import UserError

if TYPE_CHECKING:
    from trainer.config.schema import RunConfig


def validate_evaluation(config: "RunConfig", num_steps: int | None) -> None:
    """Check that there is something to evaluate where that is asked for, and that no setting is without effect.

    Args:
        config: the run, or a stage of it.
        num_steps: steps of the whole run; None where they are not known yet.

    Raises:
        UserError: one of these is not so.
    """
    if config.evaluation.every_steps and config.data.validation_fraction == 0:
        raise UserError(
            f"evaluation.every_steps={config.evaluation.every_steps} evaluates held-out documents, but "
            "data.validation_fraction=0 holds none out; raise it, or set evaluation.every_steps=0."
        )
    _validate_retention(config, num_steps)


def _validate_retention(config: "RunConfig", num_steps: int | None) -> None:
    checkpoint, evaluated_every = config.checkpoint, config.evaluation.every_steps
    keeps = f"checkpoint.keep_best={checkpoint.keep_best}"
    if not checkpoint.keep_best:
        return
    for section, every_steps in (("checkpoint", checkpoint.every_steps), ("evaluation", evaluated_every)):
        if every_steps == 0:
            raise UserError(
                f"{keeps} chooses among steps that are saved and evaluated, but {section}.every_steps=0 has one at the "
                "end alone; set it to 100, say."
            )
    both = math.lcm(checkpoint.every_steps, evaluated_every)
    if num_steps is not None and both >= num_steps:
        raise UserError(
            f"{keeps} chooses among steps that are saved and evaluated, but with checkpoint.every_steps="
            f"{checkpoint.every_steps} and evaluation.every_steps={evaluated_every} these are the multiples of {both}, "
            f"of which none is before the last of {num_steps} steps; lower them, or make one a multiple of the other."
        )
