"""DeepSpeed's configuration, generated from ours; imports no torch, so that a launcher can show it."""

from dataclasses import dataclass
from typing import Any

from sharding.config import ParallelConfig

_STAGES = {"zero1": 1, "zero2": 2, "zero3": 3}


@dataclass(frozen=True)
class BatchArithmetic:
    """How a step's sequences are divided.

    Attributes:
        micro_size: sequences in one forward and backward pass of one rank.
        accumulation_steps: passes of one rank in one step.
        num_ranks: data-parallel ranks.
    """

    micro_size: int
    accumulation_steps: int
    num_ranks: int


def deepspeed_stage(parallel: ParallelConfig) -> int:
    """ZeRO stage of a strategy."""
    return _STAGES[parallel.strategy]


def deepspeed_config(parallel: ParallelConfig, batch: BatchArithmetic, clip_norm: float) -> dict[str, Any]:
    """What ``deepspeed.initialize`` is given.

    Neither ``bf16`` nor ``fp16`` appears: both would round buffers and initial values to 16 bits. Parameters stay fp32,
    the model computes with copies of them, and the loss scale is ours.

    Args:
        parallel: strategy and offloading.
        batch: the division of a step.
        clip_norm: largest gradient norm; 0 means no clipping.
    """
    stage = deepspeed_stage(parallel)
    zero: dict[str, Any] = {"stage": stage, "contiguous_gradients": True, "round_robin_gradients": False}
    # Gradients that leave in the middle of the backward pass need the same order of collectives on every rank, and on
    # gloo there is no stream to hide them behind.
    zero["overlap_comm"] = stage == 3
    # 200 MB of fp32 gradients, since by default a rank holds 2 GB however small the model is.
    zero["reduce_bucket_size"] = 50_000_000
    for key, place in (
        ("offload_optimizer", parallel.offload_optimizer),
        ("offload_param", parallel.offload_parameters),
    ):
        if place != "none":
            zero[key] = {"device": place, "pin_memory": True}
        if place == "nvme":
            zero[key]["nvme_path"] = parallel.nvme_path
            # Four buffers of this many fp32 elements pass between files and the step, 0.8 GB, since by default a
            # partition may have 10^9 elements and all of it would be in memory.
            zero["sub_group_size"] = 50_000_000
    if parallel.offload_parameters == "nvme":
        # By default the first 10^9 elements of a rank would stay in main memory.
        zero["offload_param"]["max_in_cpu"] = 0
        # Reading ahead fails where a parameter is used twice in a short time, and parameters that are not released at
        # once use up the buffers.
        zero |= {"stage3_prefetch_bucket_size": 0, "stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}
    return {
        "train_micro_batch_size_per_gpu": batch.micro_size,
        "gradient_accumulation_steps": batch.accumulation_steps,
        "train_batch_size": batch.micro_size * batch.accumulation_steps * batch.num_ranks,
        "gradient_clipping": clip_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        # torch's fused AdamW runs on the CPU too; DeepSpeed's own would have to be compiled first.
        "zero_force_ds_cpu_optimizer": False,
        # The console is Shardline's.
        "steps_per_print": 1 << 62,
        "wall_clock_breakdown": False,
    }
