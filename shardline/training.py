"""Training from Python: what ``shardline run`` and ``python -m trainer`` do, with parts of one's own."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer import config as configuration
from trainer.config import RunConfig
from trainer.runtime.own_modules import name_own

if TYPE_CHECKING:
    from torch import nn

    from trainer.data.samples import Samples
    from trainer.ending import TrainingResult
    from trainer.tasks.task import Task
    from trainer.trackers.observer import Observer

ConfigSource = str | Path | Mapping[str, Any] | RunConfig


def load_config(
    source: ConfigSource,
    overrides: Sequence[str] = (),
    *,
    task: "Callable[..., Task] | None" = None,
    model: "Callable[..., nn.Module] | None" = None,
    samples: "Callable[..., Samples] | None" = None,
) -> RunConfig:
    """A run's whole configuration, checked.

    Parts of one's own are classes or functions at the top of a module or of the script itself. The configuration names
    them, with their module's folder, so that whoever continues or evaluates the run finds them.

    Args:
        source: a YAML file, nested settings as one has them, or a configuration to which something is added.
        overrides: settings in place of those, such as ``optimizer.lr=1e-3``.
        task: makes the task, in place of ``task.name``; is called with what it takes of ``options``, ``settings`` and
            ``facts``.
        model: makes the model, in place of ``model.factory``; is called with ``facts``, ``num_outputs`` and
            ``model.arguments``.
        samples: makes the samples, in place of ``data.factory``; is called with ``data.arguments``.

    Raises:
        UserError: something is wrong with it.
    """
    own = {"task": ("task", task), "model": ("model", model), "data": ("samples", samples)}
    names = {section: name_own(part, argument) for section, (argument, part) in own.items() if part is not None}
    return configuration.load_config(source, overrides, names)


def train(
    config: ConfigSource,
    overrides: Sequence[str] = (),
    *,
    task: "Callable[..., Task] | None" = None,
    model: "Callable[..., nn.Module] | None" = None,
    samples: "Callable[..., Samples] | None" = None,
    observers: "Sequence[Observer]" = (),
) -> "TrainingResult":
    """Train, or continue, a run on the ranks that the script was started on: by torchrun, say, or one by itself.

    Every rank must call it. It is ``python -m trainer`` but that the process goes on: the same run folder, lease,
    checkpoints, outcome, and stop by Ctrl-C, SIGTERM or ``RUN/stop``. Called again, it continues.

    Args:
        config: see ``load_config``, as for overrides, task, model and samples.
        overrides: settings in place of the configuration's.
        task: makes the task.
        model: makes the model.
        samples: makes the samples.
        observers: are told of the run, on rank 0.

    Raises:
        UserError: something that the user can mend is wrong.
        RunFailure: the run cannot go on.
    """
    # What follows takes seconds to import.
    from trainer import rank

    return rank.train(load_config(config, overrides, task=task, model=model, samples=samples), observers)
