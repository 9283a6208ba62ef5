"""Rules of pruning that span other settings; imports no torch."""

from typing import TYPE_CHECKING

from sharding.ranks.errors import UserError
from trainer.config.prune import BY_GRADIENTS

if TYPE_CHECKING:
    from trainer.config.schema import RunConfig


def validate_prune(config: "RunConfig", num_steps: int | None) -> None:
    """Check that pruning leaves something, has something to judge by, and is over before the run is.

    Args:
        config: the run, or a stage of it.
        num_steps: steps of the whole run; None where they are not known yet.

    Raises:
        UserError: one of these is not so.
    """
    prune = config.prune
    if not prune.sparsity:
        return
    if prune.sparsity == 1:
        raise UserError("prune.sparsity=1 leaves no weight of what it prunes; set it below 1, such as 0.5.")
    if prune.pattern == "2:4" and prune.sparsity != 0.5:
        raise UserError(
            f"prune.pattern=2:4 keeps two of each four weights, but prune.sparsity={prune.sparsity:g}; set it to 0.5."
        )
    if prune.end < prune.begin:
        raise UserError(
            f"prune.end={prune.end} is before prune.begin={prune.begin}; set it to at least that, or to the same to "
            "prune all at once."
        )
    if prune.pattern == "2:4" and prune.end != prune.begin:
        raise UserError(
            f"prune.pattern=2:4 prunes all at once, but prune.begin={prune.begin} and prune.end={prune.end}; set both "
            "to the same step."
        )
    if prune.by in BY_GRADIENTS and prune.begin == 0:
        raise UserError(
            f"prune.by={prune.by} judges by the gradients of steps, but prune.begin=0 is before the first; set "
            "prune.begin to 1 at least, or prune.by=magnitude."
        )
    if prune.end == 0 and config.model.pretrained is None and config.checkpoint.from_ is None:
        raise UserError(
            f"prune.sparsity={prune.sparsity:g} with prune.end=0 prunes initial values that nothing has trained; set "
            "prune.end to a step of the run, or begin with weights (model.pretrained, checkpoint.from)."
        )
    if num_steps is not None and prune.end > max(num_steps, config.schedule.total_steps):
        raise UserError(
            f"prune.end={prune.end} is after the last of {num_steps} steps, so that prune.sparsity={prune.sparsity:g} "
            "would not be reached; lower it, train longer, or set schedule.total_steps to the steps of the whole "
            "schedule, of which a short run is the beginning."
        )
