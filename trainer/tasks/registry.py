"""Tasks by name."""

import inspect
from collections.abc import Callable
from typing import Any

from sharding.ranks.errors import UserError
from trainer.config.sections import TaskConfig
from trainer.data.facts import SampleFacts
from trainer.runtime.own_modules import import_own
from trainer.tasks.causal_lm import CausalLanguageModelling
from trainer.tasks.classification import (
    AudioClassification,
    Classification,
    ImageClassification,
    SequenceClassification,
    TokenClassification,
)
from trainer.tasks.masked_lm import MaskedLanguageModelling
from trainer.tasks.regression import Regression
from trainer.tasks.task import Task


def _causal_lm(settings: TaskConfig, facts: SampleFacts, _: int, *, compiles_loss: bool = False) -> Task:
    return CausalLanguageModelling(settings.z_loss, settings.loss_chunk_tokens, facts, compiles_loss=compiles_loss)


def _masked_lm(settings: TaskConfig, facts: SampleFacts, seed: int, *, compiles_loss: bool = False) -> Task:
    return MaskedLanguageModelling(
        facts, seed, settings.mask_probability, whole_word=settings.whole_word, compiles_loss=compiles_loss
    )


def _of_rows(make: Callable[[TaskConfig, SampleFacts], Task]) -> Callable[[TaskConfig, SampleFacts, int], Task]:
    return lambda settings, facts, _: make(settings, facts)


_OVER_A_VOCABULARY: dict[str, Callable[..., Task]] = {"causal-lm": _causal_lm, "masked-lm": _masked_lm}
_TASKS: dict[str, Callable[[TaskConfig, SampleFacts, int], Task]] = {
    **_OVER_A_VOCABULARY,
    "classification": _of_rows(Classification),
    "sequence-classification": _of_rows(SequenceClassification),
    "token-classification": _of_rows(TokenClassification),
    "image-classification": _of_rows(ImageClassification),
    "audio-classification": _of_rows(AudioClassification),
    "regression": _of_rows(Regression),
}


def build_task(name: str, facts: SampleFacts | None = None, **settings: Any) -> Task:
    """A task by its name, or by ``module:Class`` for one that a folder or the environment offers.

    Args:
        name: the task.
        facts: what is known of the samples.
        settings: others of the section ``task``.

    Raises:
        UserError: there is no such task, or it takes no options.
    """
    return configured_task(TaskConfig(name=name, **settings), facts or SampleFacts())


def configured_task(
    settings: TaskConfig, facts: SampleFacts, seed: int = 0, *, compiles_loss: bool = False, **changes: Any
) -> Task:
    """The task of a run.

    Args:
        settings: the section ``task``.
        facts: what is known of the samples.
        seed: the run's, for what a task draws for each sample.
        compiles_loss: whether the loss is compiled, where that is over a vocabulary: of language modelling.
        changes: settings that are to be others.

    Raises:
        UserError: see ``build_task``.
    """
    settings = settings.model_copy(update=changes)
    name = settings.name
    if ":" not in name:
        if name not in _TASKS:
            raise UserError(f"task.name={name} is unknown; use {', '.join(_TASKS)} or module:Class.")
        if compiles_loss and name in _OVER_A_VOCABULARY:
            return _OVER_A_VOCABULARY[name](settings, facts, seed, compiles_loss=True)
        return _TASKS[name](settings, facts, seed)
    make = import_own(name, "task.name", settings.folder)
    # What goes wrong in its own code is shown with its traceback.
    task = _construct(settings, make, facts)
    _refuse_earlier_methods(name, task)
    return task


def _construct(settings: TaskConfig, make: Callable[..., Task], facts: SampleFacts) -> Task:
    parameters, options = inspect.signature(make).parameters, settings.options
    if options and "options" not in parameters:
        raise UserError(
            f"task.options={options} cannot be given to {settings.name}, whose __init__ has no argument options; write "
            "__init__(self, options, facts), or remove task.options."
        )
    given: dict[str, Any] = {"options": dict(options), "facts": facts, "settings": settings}
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
