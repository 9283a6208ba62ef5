"""Learning rate as a pure function of the step."""

import math

from trainer.sections import ScheduleConfig


def learning_rate(step: int, peak: float, schedule: ScheduleConfig, total_steps: int) -> float:
    """The rate of one optimizer step.

    Args:
        step: the step about to be taken, counted from 1.
        peak: rate at the end of warm-up.
        schedule: the curve.
        total_steps: step at which the curve ends; later steps keep its last rate.

    Returns:
        ``peak * step / warmup_steps`` during warm-up; afterwards the named curve from ``peak`` down to
        ``peak * final_lr_ratio`` at ``total_steps``.
    """
    if step < schedule.warmup_steps:
        return peak * step / schedule.warmup_steps
    remaining = 1.0 - _progress(step, schedule.warmup_steps, total_steps)
    final = schedule.final_lr_ratio
    match schedule.name:
        case "constant":
            return peak
        case "linear":
            share = remaining
        case "cosine":
            share = 0.5 * (1.0 - math.cos(math.pi * remaining))
        case "polynomial":
            share = remaining**schedule.power
        case "wsd":
            decay_steps = schedule.decay_steps or max(1, total_steps // 10)
            share = 1.0 - _progress(step, total_steps - decay_steps, total_steps)
    return peak * (final + (1.0 - final) * share)


def _progress(step: int, start: int, end: int) -> float:
    """Share of the way from start to end, within [0, 1]."""
    if step >= end:
        return 1.0
    return max(0.0, (step - start) / (end - start))
