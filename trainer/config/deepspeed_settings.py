"""What DeepSpeed is told about a run; imports no torch, so that a launcher can show it."""

from typing import Any

from sharding.deepspeed_backend.settings import BatchArithmetic, deepspeed_config
from sharding.parallel_dims import ParallelDims
from trainer.config.rules import accumulation_steps
from trainer.config.schema import RunConfig


def deepspeed_settings(config: RunConfig, dims: ParallelDims) -> dict[str, Any]:
    """DeepSpeed's configuration for a run on so many ranks."""
    batch = BatchArithmetic(config.batch.micro_size, accumulation_steps(config, dims), dims.data_degree)
    return deepspeed_config(config.parallel, batch, config.optimizer.clip_norm)
