"""In which number format a model computes; masters, reduction and optimizer state are always fp32.

One rule for every strategy. The forward pass sees every floating parameter in that format, and floating inputs as well;
buffers stay what they are. Gradients leave a backward pass in it, and add up over micro-batches and ranks in fp32.
"""

import re
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from sharding.config import PrecisionConfig
from sharding.engine import Batch, ModelDefinition
from sharding.ranks.errors import UserError

CONVERTS_ITS_OUTPUT = "converts_its_output"
"""Attribute of a model whose training loss itself brings outputs to fp32, as a compiled one does on the way."""

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}
_SPEAKS_OF_FORMATS = re.compile(r"dtype|scalar type|[Ii]nput type|[Tt]ype promoti")
_SPEAKS_OF_INTEGERS = re.compile(r"Long|Int\b|Bool|Byte|Char|int\d|long")


def compute_dtype(precision: PrecisionConfig, device: torch.device) -> torch.dtype:
    """The format of parameters and activations on this device; under ``fp8``, of what is not in 8 bits.

    ``auto`` is bf16 on GPUs that have it natively (compute capability 8.0 and up), else fp32: most CPUs emulate
    bf16 several times slower.
    """
    if precision.compute == "auto":
        native = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if native else torch.float32
    return _DTYPES[precision.compute]


def computing_in(definition: ModelDefinition, dtype: torch.dtype) -> ModelDefinition:
    """The definition of a model that takes its inputs in a format and gives out fp32; as it is in fp32.

    Its loss and evaluation raise UserError where that format meets another in a layer that cannot take both.

    Args:
        definition: the model and its functions.
        dtype: format of its parameters in computing.
    """
    if dtype is torch.float32:
        return definition
    cast_at_ends(definition.model, dtype)

    def speaking(function: Callable[[nn.Module, Batch], torch.Tensor]) -> Callable[[nn.Module, Batch], torch.Tensor]:
        def call(model: nn.Module, batch: Batch) -> torch.Tensor:
            try:
                return function(model, batch)
            except (RuntimeError, ValueError) as error:
                if (refusal := _two_formats(error, dtype)) is None:
                    raise
                raise refusal from error

        return call

    return replace(definition, loss=speaking(definition.loss), evaluate=speaking(definition.evaluate))


def cast_at_ends(model: nn.Module, dtype: torch.dtype) -> None:
    """Have a model take its floating inputs in a format, and give out fp32, of which losses and metrics are computed.

    In training a model with ``CONVERTS_ITS_OUTPUT`` gives out what it has computed.

    Args:
        model: the whole model, called once in each forward pass.
        dtype: format of its parameters in computing; fp32 leaves everything alone.
    """
    if dtype is torch.float32:
        return

    def cast(module: nn.Module, _: tuple[Any, ...], output: Any) -> Any:
        if module.training and getattr(module, CONVERTS_ITS_OUTPUT, False):
            return output
        return tree_map_only(torch.Tensor, lambda x: x.float() if x.is_floating_point() else x, output)

    cast_inputs_at_entry(model, dtype)
    model.register_forward_hook(cast)


def cast_inputs_at_entry(model: nn.Module, dtype: torch.dtype) -> None:
    """Have a model take its floating inputs in a format, wherever they lie in its arguments; fp32 leaves them alone.

    By a hook on the model itself, so that its layers get what the layers before them made and nothing else is cast.

    Args:
        model: the whole model, called once in each forward pass.
        dtype: format of its parameters in computing.
    """
    if dtype is torch.float32:
        return

    def cast(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return tree_map_only(torch.Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x, (args, kwargs))

    model.register_forward_pre_hook(cast, with_kwargs=True)


def _two_formats(error: Exception, dtype: torch.dtype) -> UserError | None:
    """The sentence for two formats that have met in one operation; None where the error is about something else."""
    found = (str(error).strip().splitlines() or [""])[0]
    if isinstance(error, UserError) or not _SPEAKS_OF_FORMATS.search(found) or _SPEAKS_OF_INTEGERS.search(found):
        return None
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/torch/" not in frame.filename]
    place = f"{Path(frames[-1].filename).name}, line {frames[-1].lineno}"
    name = str(dtype).removeprefix("torch.")
    return UserError(
        f"precision.compute: parameters and inputs of the model are {name} and its buffers are what they were, and two "
        f"formats meet at {place} ({found.rstrip('.')}); bring what a layer takes to the format of its weights, as in "
        "layer(x.to(layer.weight.dtype)), or set precision.compute=fp32."
    )
