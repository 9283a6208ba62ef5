"""Whether there is such a metric as a run is to be judged by, before it is trained."""

from collections.abc import Mapping

from sharding.ranks.errors import UserError
from trainer.config import RunConfig
from trainer.tasks.task import Better, Task


def check_monitor(config: RunConfig, task: Task) -> None:
    """Assert that the metric that a run is judged by, where anything is or it was named, is one of the task.

    A task that does not say which it has, or is derived from one that does and has others, is asked at its first
    evaluation.

    Raises:
        UserError: the task has no such metric.
    """
    known, monitor = _directions(task), config.evaluation.monitor
    if known is None or not (config.evaluation.is_monitored or config.checkpoint.keep_best):
        return
    sets = [one.name for one in config.evaluation.sets]
    sets += [source.name for source in config.data.mixture] if config.evaluation.by_source else []
    names = [prefix + name for prefix in ("", *(f"{one}/" for one in sets)) for name in known]
    names += [f"ema_{name}" for name in names if config.optimizer.ema_decay]
    if monitor not in names:
        raise UserError(
            f"evaluation.monitor={monitor} is no metric of task.name={config.task.name}, which has {', '.join(names)}; "
            "name one of them."
        )


def _directions(task: Task) -> Mapping[str, Better] | None:
    task = getattr(task, "inner", task)
    # The first of the task's classes that has either: metrics of its own may be others than those said above.
    owner = next((kind for kind in type(task).__mro__ if {"metrics", "directions"} & vars(kind).keys()), object)
    return task.directions() if "directions" in vars(owner) else None
