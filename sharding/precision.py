"""Which number formats a device computes in; masters, reduction and optimizer state are always fp32."""

import torch

from sharding.config import PrecisionConfig

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}


def compute_dtype(precision: PrecisionConfig, device: torch.device) -> torch.dtype:
    """The format of matrix products on this device; under ``fp8``, of those that are not in 8 bits.

    ``auto`` is bf16 on GPUs that have it natively (compute capability 8.0 and up), else fp32: most CPUs emulate
    bf16 several times slower.
    """
    if precision.compute == "auto":
        native = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if native else torch.float32
    return _DTYPES[precision.compute]
