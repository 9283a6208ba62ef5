"""Peak arithmetic rates of accelerators, for model FLOPs utilisation; unknown stays unknown."""

import re
from typing import Literal

import torch

ComputeFormat = Literal["fp32", "tf32", "fp16", "bf16", "fp8"]

# Dense tensor-core rates in FLOP/s, without structured sparsity, from NVIDIA's data sheets, which give the sparse one,
# twice as much, for all but A100: H100 and H200 "NVIDIA H100 Tensor Core GPU" and "NVIDIA H200 Tensor Core GPU", A100
# "NVIDIA A100 Tensor Core GPU", B200 "NVIDIA DGX B200" (per GPU), L40S "NVIDIA L40S". fp16 has bf16's rate on all.
_PEAK_FLOPS: dict[str, dict[ComputeFormat, float]] = {
    "H100 PCIe": {"tf32": 378e12, "bf16": 756e12, "fp8": 1513e12},
    "H100 NVL": {"tf32": 418e12, "bf16": 835e12, "fp8": 1671e12},
    "H100": {"tf32": 494e12, "bf16": 989e12, "fp8": 1979e12},
    "H200 NVL": {"tf32": 418e12, "bf16": 836e12, "fp8": 1671e12},
    "H200": {"tf32": 494e12, "bf16": 989e12, "fp8": 1979e12},
    "B200": {"tf32": 1125e12, "bf16": 2250e12, "fp8": 4500e12},
    "A100": {"tf32": 156e12, "bf16": 312e12},
    "L40S": {"tf32": 183e12, "bf16": 362e12, "fp8": 733e12},
}


def compute_format(compute: str, dtype: torch.dtype) -> ComputeFormat:
    """The format whose peak a run is measured against.

    Args:
        compute: ``precision.compute``.
        dtype: what it means on this device; see ``compute_dtype``.
    """
    if compute == "fp8":
        return "fp8"
    formats: dict[torch.dtype, ComputeFormat] = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
    if formats[dtype] == "fp32" and torch.get_float32_matmul_precision() != "highest":
        return "tf32"
    return formats[dtype]


def peak_flops(device: torch.device, number_format: ComputeFormat) -> float | None:
    """Dense peak of a device in FLOP/s for the format of its products; None where it is not known."""
    if device.type != "cuda":
        return None
    return peak_flops_of(torch.cuda.get_device_name(device), number_format)


def peak_flops_of(device_name: str, number_format: ComputeFormat) -> float | None:
    """Dense peak in FLOP/s by the name that the driver gives a GPU; None where it is not known.

    Whole words count: an RTX A1000 is no A100.
    """
    for model, peaks in _PEAK_FLOPS.items():
        if re.search(rf"\b{re.escape(model)}\b", device_name):
            return peaks.get("bf16" if number_format == "fp16" else number_format)
    return None
