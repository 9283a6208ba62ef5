"""Peaks of GPUs: by whole names, and by the format of the products."""

import pytest
import torch

from trainer.metrics.peak_flops import ComputeFormat, compute_format, peak_flops, peak_flops_of


@pytest.mark.parametrize(
    ("name", "number_format", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989e12),
        ("NVIDIA H100 PCIe", "bf16", 756e12),
        ("NVIDIA H200", "bf16", 989e12),
        ("NVIDIA H200", "fp8", 1979e12),
        ("NVIDIA H200", "tf32", 494e12),
        ("NVIDIA H200", "fp32", None),
        ("NVIDIA H200 NVL", "fp16", 836e12),
        ("NVIDIA A100-SXM4-80GB", "fp16", 312e12),
        ("NVIDIA A100-SXM4-80GB", "fp8", None),
        # Workstation cards whose names begin as those of servers' do.
        ("NVIDIA RTX A1000", "bf16", None),
        ("NVIDIA RTX A1000 Laptop GPU", "bf16", None),
        ("NVIDIA L40", "bf16", None),
        ("NVIDIA GeForce RTX 4090", "bf16", None),
    ],
)
def test_a_peak_is_of_the_named_gpu_and_format(name: str, number_format: ComputeFormat, peak: float | None) -> None:
    assert peak_flops_of(name, number_format) == peak


def test_a_run_is_measured_against_the_format_of_its_products() -> None:
    assert compute_format("fp8", torch.bfloat16) == "fp8"
    assert compute_format("auto", torch.bfloat16) == "bf16"
    assert compute_format("fp16", torch.float16) == "fp16"
    assert compute_format("fp32", torch.float32) == "fp32"
    torch.set_float32_matmul_precision("high")
    try:
        assert compute_format("fp32", torch.float32) == "tf32"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert peak_flops(torch.device("cpu"), "bf16") is None
