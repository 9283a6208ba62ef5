"""What DeepSpeed is told about a run; imports no torch, so that a launcher can show it."""

from typing import Any

from sharding.deepspeed_backend.settings import BatchArithmetic, deepspeed_config
from trainer.config.rules import accumulation_steps
from trainer.config.schema import RunConfig


def deepspeed_settings(config: RunConfig, num_ranks: int) -> dict[str, Any]:
    """DeepSpeed's configuration for a run on so many data-parallel ranks."""
    batch = BatchArithmetic(config.batch.micro_size, accumulation_steps(config, num_ranks), num_ranks)
    return deepspeed_config(config.parallel, batch, config.optimizer.clip_norm)
