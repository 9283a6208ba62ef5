"""Which number formats a device computes in; masters, reduction and optimizer state are always fp32."""

import torch

from sharding.config import PrecisionConfig
from sharding.errors import UserError

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def compute_dtype(precision: PrecisionConfig, device: torch.device) -> torch.dtype:
    """The format of matrix products on this device.

    ``auto`` is bf16 on GPUs that have it natively (compute capability 8.0 and up), else fp32: most CPUs emulate
    bf16 several times slower.

    Raises:
        UserError: the format is not there yet.
    """
    if precision.compute == "auto":
        native = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if native else torch.float32
    if precision.compute not in _DTYPES:
        raise UserError(f"precision.compute={precision.compute} is not there yet; use auto, fp32, bf16 or fp16.")
    return _DTYPES[precision.compute]
