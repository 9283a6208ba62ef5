"""Which number formats a device computes in; masters, reduction and optimizer state are always fp32."""

from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from sharding.config import PrecisionConfig

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}


def compute_dtype(precision: PrecisionConfig, device: torch.device) -> torch.dtype:
    """The format of parameters and activations on this device; under ``fp8``, of what is not in 8 bits.

    ``auto`` is bf16 on GPUs that have it natively (compute capability 8.0 and up), else fp32: most CPUs emulate
    bf16 several times slower.
    """
    if precision.compute == "auto":
        native = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if native else torch.float32
    return _DTYPES[precision.compute]


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
