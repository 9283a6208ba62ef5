"""What a race may not ask for: settings that one contestant alone would obey."""

from functools import reduce
from typing import Any

from sharding.ranks.errors import UserError
from trainer.config import RunConfig

# Values that a plain loop and all peers share.
_SHARED: dict[str, Any] = {
    "compile.enabled": False,
    "activation_checkpointing.mode": "none",
    "task.loss_chunk_tokens": 0,
    "optimizer.ema_decay": 0.0,
    "metrics.gradient_noise_scale": False,
}


def check_same_work(config: RunConfig) -> None:
    """Assert that all contestants of a race would do what its run says.

    Raises:
        UserError: Shardline alone would do it.
    """
    for name, shared in _SHARED.items():
        value = reduce(getattr, name.split("."), config)
        if value != shared:
            # As YAML has it.
            found, neutral = (str(one).lower() if isinstance(one, bool) else one for one in (value, shared))
            raise UserError(
                f"{name}={found}: of the contestants of a race Shardline alone would obey it; leave it at {neutral}."
            )
    if config.precision.compute in ("fp16", "fp8"):
        raise UserError(
            f"precision.compute={config.precision.compute}: the contestants of a race train in fp32 or bf16; choose "
            "one of these."
        )
