"""What a machine is and can do: versions, kernels of attention, and two ceilings."""

import time
from collections.abc import Callable
from statistics import median

import torch
from torch.nn.attention import SDPBackend

from benchmarks.device.job import Emit, Job
from trainer.run_folder.provenance import package_version

_PACKAGES = (
    *("torch", "triton", "transformers", "numpy", "pydantic", "safetensors", "tokenizers", "torchao", "accelerate"),
    *("deepspeed", "datasets", "wandb", "plotly", "matplotlib", "flash-attn", "flash-attn-3", "nvidia-ml-py"),
)
# Batch, heads, heads of keys and values, length, width: of the sizes that are measured.
_ATTENTION_SHAPES = {"llama-1b": (4, 32, 8, 2048, 64), "gpt2-124m": (16, 12, 12, 1024, 64)}
_NUM_REPEATS = 10


def measure_machine(job: Job, emit: Emit) -> None:
    """Versions, which kernels scaled dot product attention chooses, and what copying and multiplying reach."""
    device = torch.device("cuda" if job.has_gpu else "cpu")
    for package in _PACKAGES:
        emit({"row": package, "version": package_version(package)})
    if job.has_gpu:
        properties = torch.cuda.get_device_properties(device)
        emit(
            {
                "row": "device",
                "name": properties.name,
                "memory_bytes": properties.total_memory,
                "num_multiprocessors": properties.multi_processor_count,
                "capability": torch.cuda.get_device_capability(device),
                "cuda": torch.version.cuda,
                "cudnn": torch.backends.cudnn.version(),
                "nccl": ".".join(map(str, torch.cuda.nccl.version())),
            }
        )
    _name_attention_kernels(device, emit)
    _measure_copy(device, 2**32 if job.has_gpu else 2**24, emit)
    _measure_product(device, 8192 if job.has_gpu else 256, emit)


def _name_attention_kernels(device: torch.device, emit: Emit) -> None:
    for size, (batch, heads, kv_heads, length, width) in _ATTENTION_SHAPES.items():
        if device.type == "cpu":
            batch, length = 1, 64
        for dtype in (torch.bfloat16, torch.float32):
            query = torch.randn(batch, heads, length, width, device=device, dtype=dtype, requires_grad=True)
            key, value = (
                torch.randn(batch, kv_heads, length, width, device=device, dtype=dtype, requires_grad=True)
                for _ in range(2)
            )
            if kv_heads != heads:
                # As transformers does where it hands over no groups.
                key, value = (part.repeat_interleave(heads // kv_heads, dim=1) for part in (key, value))
            chosen = torch._fused_sdp_choice(query, key, value, None, 0.0, is_causal=True)
            name = SDPBackend(chosen).name
            emit({"row": f"attention {size} {str(dtype).removeprefix('torch.')}", "kernel": name})


def _measure_copy(device: torch.device, num_bytes: int, emit: Emit) -> None:
    source = torch.randint(256, (num_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    elapsed_s = _median_s(lambda: target.copy_(source), device)
    emit({"row": "copy on the device", "bytes_per_s": 2 * num_bytes / elapsed_s, "num_bytes": num_bytes})


def _measure_product(device: torch.device, size: int, emit: Emit) -> None:
    # Random, since products of zeros take less power and run faster.
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    elapsed_s = _median_s(lambda: left @ right, device)
    format_name = "bf16" if dtype is torch.bfloat16 else "fp32"
    emit({"row": f"product {size}^3 {format_name}", "flops_per_s": 2 * size**3 / elapsed_s})


def _median_s(work: Callable[[], object], device: torch.device) -> float:
    """Median time of a call in seconds, after three that do not count."""
    for _ in range(3):
        work()
    times = []
    for _ in range(_NUM_REPEATS):
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            work()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        else:
            begun_at = time.perf_counter()
            work()
            times.append(time.perf_counter() - begun_at)
    return median(times)
