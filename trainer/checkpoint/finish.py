"""When a run is finished: its budget is used up, or what is monitored no longer improves. Imports no torch."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from sharding.ranks.errors import UserError
from trainer.checkpoint.training_state import Better, MonitorState, TrainingState
from trainer.config import RunConfig

ALL_STEPS = "all steps done"
"""The reason of a run whose budget is used up."""


def finish_reason(training: TrainingState, config: RunConfig) -> str | None:
    """Why nothing is left to train after a step; None while something is.

    The one place that says so: of counters that all ranks, and whoever reads a checkpoint, have alike.
    """
    if config.is_length_known and training.step >= config.num_steps:
        return ALL_STEPS
    settings, state = config.evaluation, training.monitor
    if settings.patience == 0 or state.metric != settings.monitor or state.num_not_better < settings.patience:
        return None
    best = "never" if state.best is None else f"{state.best:.6g} after step {state.best_step}"
    by = f" by more than {settings.min_delta:g}" if settings.min_delta else ""
    return (
        f"stopped early: eval/{state.metric}, at best {best}, has not improved{by} in "
        f"{state.num_not_better} evaluations (evaluation.patience={settings.patience})"
    )


def complete_at(step: int, reason: str) -> str:
    """What to say of a run that has nothing left to train after a step."""
    return f"complete at step {step}" if reason == ALL_STEPS else f"complete at step {step}, {reason}"


def remedy(training: TrainingState, config: RunConfig, reason: str) -> str:
    """A setting with which a run that is finished goes on."""
    if reason != ALL_STEPS:
        # Of a run whose patience was lowered, twice that might still be too little.
        return f"evaluation.patience={2 * training.monitor.num_not_better}"
    if config.stages:
        last, key = config.stages[-1], f"stages.{len(config.stages) - 1}"
        return f"{key}.steps={2 * last.steps}" if last.steps is not None else f"{key}.tokens={2 * (last.tokens or 0)}"
    if config.epochs is not None:
        return f"epochs={2 * config.epochs:g}"
    return f"tokens={2 * config.tokens}" if config.tokens is not None else f"steps={2 * config.num_steps}"


def after_evaluation(
    training: TrainingState, config: RunConfig, evaluated: Mapping[str, tuple[float, Better]]
) -> TrainingState:
    """The state with an evaluation of its step taken into account; a value that is not finite improves nothing.

    Only evaluations that are due by ``evaluation.every_steps`` count for patience.

    Args:
        training: the state after the step.
        config: says what is monitored.
        evaluated: value and better direction of each metric, equal on all ranks.

    Raises:
        UserError: what is to be monitored is none of the metrics.
    """
    finite = {name: value for name, (value, _) in evaluated.items() if math.isfinite(value)}
    training = training.model_copy(update={"eval_metrics": finite})
    settings, prune = config.evaluation, config.prune
    name = settings.monitor
    if name not in evaluated:
        if evaluated and (settings.is_monitored or config.checkpoint.keep_best):
            raise unknown_monitor(name, evaluated)
        return training
    if not settings.every_steps or training.step % settings.every_steps:
        # The one at the end of a run, which a run of more steps does not have: counted, it would stop that one earlier.
        return training
    if prune.sparsity and training.step < prune.end:
        # What fewer and fewer weights reach does not compare with it, and a run that stops here would not be pruned.
        return training
    better, state = evaluated[name][1], training.monitor
    if state.metric != name:
        state = MonitorState(metric=name)
    improves = name in finite and _is_better(finite[name], state.best, better, settings.min_delta)
    if improves:
        changes: dict[str, Any] = {"best": finite[name], "best_step": training.step, "num_not_better": 0}
    else:
        changes = {"num_not_better": state.num_not_better + 1}
    return training.model_copy(update={"monitor": state.model_copy(update=changes | {"better": better})})


def unknown_monitor(name: str, metrics: Iterable[str]) -> UserError:
    """What to say of a metric that is to be monitored, and that there is none of."""
    return UserError(
        f"evaluation.monitor={name} is no metric of this run's evaluation, which has {', '.join(sorted(metrics))}; "
        "name one of them."
    )


def _is_better(value: float, best: float | None, better: Better, min_delta: float) -> bool:
    if best is None:
        return True
    return value < best - min_delta if better == "lower" else value > best + min_delta
