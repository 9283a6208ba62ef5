"""Tasks by name."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from sharding.ranks.errors import UserError
from trainer.config.sections import TaskConfig
from trainer.data.facts import SampleFacts
from trainer.runtime.own_modules import import_own
from trainer.tasks.causal_lm import CausalLanguageModelling
from trainer.tasks.masked_lm import MaskedLanguageModelling
from trainer.tasks.task import Task

_NAMES = ("causal-lm", "masked-lm")


def build_task(
    name: str,
    z_loss: float = 0.0,
    loss_chunk_tokens: int = 0,
    folder: str | None = None,
    options: Mapping[str, Any] | None = None,
    facts: SampleFacts | None = None,
) -> Task:
    """A task by its name, or by ``module:Class`` for one that a folder or the environment offers.

    Args:
        name: the task.
        z_loss: coefficient of the z-loss in its training loss, where it is one of ours.
        loss_chunk_tokens: positions whose logits exist at once, where it is one of ours; 0 means all.
        folder: where the module of one that is not ours lies, and what it imports from beside it.
        options: settings of one that is not ours, for a class whose constructor has an argument ``options``.
        facts: what is known of the samples, for a class whose constructor has an argument ``facts``.

    Raises:
        UserError: there is no such task, or it takes no options.
    """
    if ":" not in name:
        if name not in _NAMES:
            raise UserError(f"task.name={name} is unknown; use {', '.join(_NAMES)} or module:Class.")
        return CausalLanguageModelling(z_loss, loss_chunk_tokens)
    make = import_own(name, "task.name", folder)
    # What goes wrong in its own code is shown with its traceback.
    task = _construct(name, make, options or {}, facts or SampleFacts())
    _refuse_earlier_methods(name, task)
    return task


def configured_task(settings: TaskConfig, facts: SampleFacts, seed: int = 0, **changes: Any) -> Task:
    """The task of a run.

    Args:
        settings: the section ``task``.
        facts: what is known of the samples.
        seed: the run's, for what a task draws for each sample.
        changes: settings that are to be others.

    Raises:
        UserError: see ``build_task``.
    """
    task: TaskConfig = settings.model_copy(update=changes)
    if task.name == "masked-lm":
        return MaskedLanguageModelling(facts, seed, task.mask_probability, whole_word=task.whole_word)
    return build_task(task.name, task.z_loss, task.loss_chunk_tokens, task.folder, task.options, facts)


def _construct(name: str, make: Callable[..., Task], options: Mapping[str, Any], facts: SampleFacts) -> Task:
    parameters = inspect.signature(make).parameters
    if options and "options" not in parameters:
        raise UserError(
            f"task.options={dict(options)} cannot be given to {name}, whose __init__ has no argument options; write "
            "__init__(self, options, facts), or remove task.options."
        )
    given: dict[str, Any] = {"options": dict(options), "facts": facts}
    return make(**{argument: value for argument, value in given.items() if argument in parameters})


def _refuse_earlier_methods(name: str, task: Task) -> None:
    """Refuse a task that is written for an earlier release, whose methods would be passed over or called wrongly.

    Raises:
        UserError: it has such methods.
    """
    earlier = [method for method in ("evaluation_sums", "evaluation_metrics") if hasattr(task, method)]
    if hasattr(task, "loss") and "model" in inspect.signature(task.loss).parameters:
        earlier.append("loss(model, batch)")
    if hasattr(task, "make_batch") and not _takes(task.make_batch, "samples", "positions", training=True):
        earlier.append("make_batch(sequences)")
    if hasattr(task, "build_model") and not _takes(task.build_model, "model_settings", "facts"):
        earlier.append("build_model(model_config)")
    if earlier:
        raise UserError(
            f"task.name={name} has {', '.join(earlier)} of an earlier release; write "
            "build_model(model_settings, facts), make_batch(samples, positions, training), forward(model, batch), "
            "loss(outputs, batch), evaluate(outputs, batch) and metrics(sums) instead, as trainer/tasks/task.py says."
        )


def _takes(method: Callable[..., Any], *arguments: str, **named: bool) -> bool:
    """Whether a method can be called so."""
    try:
        inspect.signature(method).bind(*arguments, **named)
    except TypeError:
        return False
    return True
