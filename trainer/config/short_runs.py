"""Settings that turn a run into a few steps of the same training, for measurements and drills; imports no torch."""

from trainer.config.schedule import CURVES_WITH_END
from trainer.config.schema import RunConfig

UNJUDGED = (
    "evaluation.every_steps=0",
    "evaluation.patience=0",
    "evaluation.min_delta=0",
    "evaluation.monitor=loss",
    "checkpoint.keep_best=0",
)
"""Overrides under which nothing is evaluated before the end, and so nothing judged by it."""

_LONG = 100_000


def beginning_of_schedule(config: RunConfig, num_steps: int, total_steps: int | None = None) -> list[str]:
    """Overrides under which so few steps are the beginning of the run's schedule.

    Args:
        config: the whole run.
        num_steps: steps that are taken of it.
        total_steps: where a curve with an end is to end, in place of where it does.
    """
    schedule, prune = config.schedule, config.prune
    if schedule.name in CURVES_WITH_END:
        whole = schedule.total_steps or (config.num_steps if config.is_length_known else _LONG)
        return [f"schedule.total_steps={total_steps or whole}"]
    # Without an end a warm-up may not be longer than the run, and pruning neither.
    settings = [f"schedule.warmup_steps={num_steps}"] if schedule.warmup_steps > num_steps else []
    if prune.sparsity and prune.end > num_steps:
        settings += [f"prune.begin={num_steps}", f"prune.end={num_steps}"]
    return settings
