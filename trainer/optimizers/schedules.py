"""Learning rate as a pure function of the step."""

import math

from trainer.config.schedule import CURVES_WITH_END, ScheduleConfig, num_warmup_steps


def learning_rate(step: int, peak: float, schedule: ScheduleConfig, total_steps: int) -> float:
    """The rate of one optimizer step.

    With w = warmup_steps, or the steps that warmup_fraction of total_steps comes to, the share of the peak is step / w
    during warm-up. Afterwards it falls from 1 to the floor final_lr_ratio. A curve with an end (``linear``, ``cosine``,
    ``polynomial``, ``wsd``) is there at ``total_steps`` and stays; the others never go below it:

    - ``inverse_sqrt``: sqrt(max(w, 1) / step), from Vaswani et al., "Attention Is All You Need" (2017), section 5.3,
      with the constant in front chosen so that the peak is ``peak``.
    - ``exponential``: decay_rate ^ ((step - w) / decay_every_steps).
    - ``step``: decay_rate ^ (number of drops before the step), as torch's StepLR and MultiStepLR; milestones at 80 and
      90 % of the run with a decay_rate of 0.316 are the curve of DeepSeek-AI, "DeepSeek LLM" (2024), section 2.3.

    Args:
        step: the step about to be taken, counted from 1.
        peak: rate at the end of warm-up.
        schedule: the curve.
        total_steps: step at which a curve with an end ends; later steps keep its last rate.

    Returns:
        The rate, at most ``peak``.
    """
    warmup_steps = num_warmup_steps(schedule, total_steps)
    if step < warmup_steps:
        return peak * step / warmup_steps
    remaining = 1.0 - _progress(step, warmup_steps, total_steps)
    final = schedule.final_lr_ratio
    match schedule.name:
        case "constant":
            return peak
        case "inverse_sqrt" | "exponential" | "step":
            return peak * max(final, _endless_share(step, schedule, warmup_steps))
        case "linear":
            share = remaining
        case "cosine":
            share = 0.5 * (1.0 - math.cos(math.pi * remaining))
        case "polynomial":
            share = remaining**schedule.power
        case "wsd":
            decay_steps = schedule.decay_steps or max(1, total_steps // 10)
            # A tenth of the steps may be more than warm-up leaves.
            decay_start = max(total_steps - decay_steps, warmup_steps)
            share = 1.0 - _progress(step, decay_start, total_steps)
    return peak * (final + (1.0 - final) * share)


def sentence_after_curve(schedule: ScheduleConfig, total_steps: int, step: int, num_steps: int) -> str | None:
    """What to say of a run that goes on after its curve has ended, at its last rate; None where none does.

    Args:
        schedule: the curve.
        total_steps: step at which a curve with an end ends.
        step: finished steps.
        num_steps: steps after which the run is finished.
    """
    if schedule.name not in CURVES_WITH_END or num_steps <= total_steps or step >= num_steps:
        return None
    whose = "" if schedule.total_steps else ", the steps that this run was first started with"
    return (
        f"schedule.name={schedule.name} ends at step {total_steps}{whose}: steps {max(total_steps, step) + 1} to "
        f"{num_steps} train at {schedule.final_lr_ratio:g} x optimizer.lr (schedule.final_lr_ratio); set "
        f"schedule.total_steps={num_steps} to have it end there."
    )


def _endless_share(step: int, schedule: ScheduleConfig, warmup_steps: int) -> float:
    """Share of the peak on a curve without a horizon, before the floor."""
    after_warmup = step - warmup_steps
    if schedule.name == "inverse_sqrt":
        return math.sqrt(max(warmup_steps, 1) / step)
    if schedule.name == "exponential":
        return schedule.decay_rate ** (after_warmup / schedule.decay_every_steps)
    if schedule.milestones:
        num_drops = sum(milestone < step for milestone in schedule.milestones)
    else:
        num_drops = max(after_warmup - 1, 0) // schedule.decay_every_steps
    return schedule.decay_rate**num_drops


def _progress(step: int, start: int, end: int) -> float:
    """Share of the way from start to end, within [0, 1]."""
    if step >= end:
        return 1.0
    return max(0.0, (step - start) / (end - start))
