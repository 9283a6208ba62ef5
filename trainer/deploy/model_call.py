"""How a task calls its model, and the same call answered by an exported model in its place."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from sharding.engine import Batch
from sharding.ranks.errors import UserError
from trainer.tasks.task import Task

Compute = Callable[[Mapping[str, torch.Tensor]], torch.Tensor]
"""From inputs by name to logits, all on the host."""


@dataclass(frozen=True, eq=False)
class ModelCall:
    """The one call of the model in a task's forward pass.

    Attributes:
        inputs: tensors by argument, dim 0 the sample.
        constants: all other arguments.
        logits: what came of it.
        gives_tensor: whether the model returned just that, and not something that has ``logits``.
        texts: names of inputs whose dim 1 is the length of a text.
    """

    inputs: dict[str, torch.Tensor]
    constants: dict[str, Any]
    logits: torch.Tensor
    gives_tensor: bool
    texts: frozenset[str] = frozenset()


def record_call(task: Task, model: nn.Module, batch: Batch, *, reads_texts: bool) -> ModelCall:
    """Run a task's forward pass, and note how it calls the model.

    Args:
        task: calls it.
        model: the model.
        batch: what with.
        reads_texts: whether samples are texts, whose whole numbers are then tokens or go along with them.

    Raises:
        UserError: it calls it more than once or not at all, or in a way that no exported model can be.
    """
    calls: list[tuple[dict[str, Any], Any]] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], made: Any) -> None:
        calls.append((_by_name(module, args, kwargs), made))

    hook = model.register_forward_hook(note, with_kwargs=True)
    try:
        with torch.no_grad():
            task.forward(model, batch)
    finally:
        hook.remove()
    name = type(task).__name__
    if len(calls) != 1:
        raise UserError(
            f"{name}.forward calls the model {len(calls)} times, and an exported model holds one call; let it call the "
            "model once, or export it by --format hf."
        )
    arguments, made = calls[0]
    inputs = {key: value for key, value in arguments.items() if isinstance(value, torch.Tensor)}
    logits = getattr(made, "logits", made)
    if not isinstance(logits, torch.Tensor):
        raise UserError(
            f"the model that {name} calls returns {type(made).__name__}, of which it is not known what is its "
            "prediction; return a tensor, or something with a tensor logits."
        )
    num_rows = len(logits)
    for key, value in inputs.items():
        if value.ndim == 0 or len(value) != num_rows:
            raise UserError(
                f"the model's input {key} has shape {list(value.shape)}, and its prediction {list(logits.shape)}; dim "
                "0 of both must be the sample, or an exported model could take no other number of samples."
            )
    constants = {key: value for key, value in arguments.items() if key not in inputs}
    tokens = {key for key, value in inputs.items() if value.ndim > 1 and not value.is_floating_point()}
    texts = frozenset(tokens if reads_texts else ())
    return ModelCall(inputs, constants, logits, gives_tensor=made is logits, texts=texts)


@contextmanager
def answered_by(compute: Compute, model: nn.Module, call: ModelCall) -> Iterator[None]:
    """Let something else compute what a task asks of its model.

    Args:
        compute: what computes.
        model: the model, which stays what it is but for its forward pass.
        call: how the task calls it.
    """

    def forward(*args: Any, **kwargs: Any) -> Any:
        arguments = _bound(signature, args, kwargs)
        given = {key: value for key, value in arguments.items() if isinstance(value, torch.Tensor)}
        if given.keys() != call.inputs.keys():
            raise UserError(
                f"the model is called with {', '.join(given)} now, and with {', '.join(call.inputs)} before; an "
                "exported model has the same inputs for all samples."
            )
        logits = compute(given)
        return logits if call.gives_tensor else SimpleNamespace(logits=logits)

    signature = inspect.signature(model.forward)
    # Of the instance, which comes before its class's: all else that a task may ask of the model is as it was.
    model.forward = forward
    try:
        yield
    finally:
        del model.forward


def _by_name(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return _bound(inspect.signature(module.forward), args, kwargs)


def _bound(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a call by name, without those that are None."""
    arguments: dict[str, Any] = {}
    for name, value in signature.bind(*args, **kwargs).arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            arguments |= value
        elif kind is inspect.Parameter.VAR_POSITIONAL:
            arguments |= {f"{name}_{index}": one for index, one in enumerate(value)}
        else:
            arguments[name] = value
    return {name: value for name, value in arguments.items() if value is not None}
