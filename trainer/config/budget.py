"""Rules of a run's length: its budget, and the schedule over it; imports no torch."""

from decimal import ROUND_DOWN, Decimal
from typing import TYPE_CHECKING

from sharding.ranks.errors import UserError
from trainer.config.schedule import num_warmup_steps, validate_curve

if TYPE_CHECKING:
    from trainer.config.schema import RunConfig

_BUDGETS = ("steps", "tokens", "epochs")


def validate_budget(config: "RunConfig") -> None:
    """Check that a run has one budget.

    Raises:
        UserError: it has none, or several.
    """
    given = [f"{key}={getattr(config, key)}" for key in _BUDGETS if getattr(config, key) is not None]
    if len(given) != 1:
        raise UserError(
            f"a run has a budget of steps, tokens or epochs, but {' and '.join(given) or 'none of them is set'}: set "
            "exactly one of them (another can be taken back with steps=null, tokens=null or epochs=null)."
        )
    if config.tokens is not None and (config.data.has_rows or config.data.source == "factory"):
        raise UserError(
            f"tokens={config.tokens} counts samples of data.sequence_length tokens, but rows have lengths of their "
            "own, or no tokens; set steps or epochs instead."
        )


def budget(config: "RunConfig") -> tuple[str, str]:
    """Name of the setting that says how long a run is, and its value with what that comes to, for an error."""
    if config.tokens is not None:
        return "tokens", f"{config.tokens} = {config.num_steps} steps of {config.tokens_per_step} tokens"
    if config.epochs is not None:
        size = f"{config.batch.global_size} of {config.epoch_samples} samples"
        return "epochs", f"{config.epochs:g} = {config.num_steps} steps of {size}"
    return "steps", f"{config.steps}"


def budget_of(config: "RunConfig", num_steps: int) -> str:
    """A run's budget, in the setting that it is given by, of a number of steps."""
    if config.tokens is not None:
        return f"{num_steps * config.tokens_per_step}"
    if config.epochs is not None:
        # Rounded down, for a little more would be a step more.
        share = Decimal(num_steps * config.batch.global_size) / Decimal(config.epoch_samples or 1)
        return f"{share.quantize(Decimal('0.000001'), ROUND_DOWN).normalize():f}"
    return f"{num_steps}"


def validate_schedule(config: "RunConfig") -> None:
    """Check that the curve has what it needs, and that warm-up and decay are within it.

    Raises:
        UserError: one of these is not so.
    """
    schedule = config.schedule
    if not (schedule.total_steps or config.is_length_known):
        validate_curve(schedule, schedule.warmup_steps)
        return
    total = schedule.total_steps or config.num_steps
    warmup_steps = num_warmup_steps(schedule, total)
    validate_curve(schedule, warmup_steps)
    warmup = f"schedule.warmup_steps={warmup_steps}"
    if schedule.warmup_fraction:
        warmup = f"schedule.warmup_fraction={schedule.warmup_fraction:g} = {warmup_steps} steps"
    if warmup_steps > total:
        raise UserError(
            f"{warmup} is more than the {total} steps of the schedule; set schedule.warmup_steps to {total} at most, "
            "or schedule.total_steps to the steps of the whole schedule, of which a short run is the beginning."
        )
    if warmup_steps + schedule.decay_steps > total:
        raise UserError(
            f"{warmup} + schedule.decay_steps={schedule.decay_steps} is more than the {total} steps of the schedule; "
            "lower one of them."
        )
