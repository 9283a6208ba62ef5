"""Tasks by name."""

import importlib
import sys

from sharding.errors import UserError
from trainer.tasks.causal_lm import CausalLanguageModelling
from trainer.tasks.task import Task

_TASKS = {"causal-lm": CausalLanguageModelling}


def build_task(name: str, z_loss: float = 0.0, loss_chunk_tokens: int = 0) -> Task:
    """A task by its name, or by ``module:Class`` for one that the working folder or the environment offers.

    Args:
        name: the task.
        z_loss: coefficient of the z-loss in its training loss, where it is one of ours.
        loss_chunk_tokens: positions whose logits exist at once, where it is one of ours; 0 means all.

    Raises:
        UserError: there is no such task.
    """
    if ":" not in name:
        if name not in _TASKS:
            raise UserError(f"task.name={name} is unknown; use {', '.join(_TASKS)} or module:Class.")
        return _TASKS[name](z_loss, loss_chunk_tokens)
    module_name, _, class_name = name.partition(":")
    if "" not in sys.path:
        # A job's own copy of the module, on PYTHONPATH, goes before the one in the working folder.
        sys.path.insert(len(sys.path) if sys.flags.safe_path else 0, "")
    try:
        return getattr(importlib.import_module(module_name), class_name)()
    except (ImportError, AttributeError) as error:
        raise UserError(f"task.name={name} cannot be imported: {error}; check the module and class name.") from None
