"""Peak arithmetic rates of accelerators, for model FLOPs utilisation; unknown stays unknown."""

import torch

# Dense bf16 tensor-core rates in FLOP/s, without structured sparsity, from NVIDIA's data sheets:
# H100 and H200 "NVIDIA H100 Tensor Core GPU" / "NVIDIA H200 Tensor Core GPU" (half of the sparse figure), A100
# "NVIDIA A100 Tensor Core GPU", B200 "NVIDIA DGX B200" (per GPU, half of the sparse figure), L40S "NVIDIA L40S".
_PEAK_BF16_FLOPS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Dense peak of a device in FLOP/s for a compute format; None where it is not known."""
    if device.type != "cuda" or dtype is not torch.bfloat16:
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for model, flops in _PEAK_BF16_FLOPS.items() if model in name), None)
