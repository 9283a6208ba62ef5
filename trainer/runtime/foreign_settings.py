"""Settings that `accelerate launch` or `accelerate config` made behind the run configuration's back."""

from collections.abc import Mapping

from sharding.ranks.errors import UserError

# Variables by which Accelerate hands settings to its ranks, the value that changes nothing, and what decides instead.
_NEUTRAL = {
    "ACCELERATE_MIXED_PRECISION": ("no", "precision.compute"),
    "ACCELERATE_DYNAMO_BACKEND": ("no", "compile"),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("1", "batch.global_size"),
    "ACCELERATE_USE_FSDP": ("false", "parallel.strategy"),
    "ACCELERATE_USE_DEEPSPEED": ("false", "parallel.strategy"),
    "ACCELERATE_USE_MEGATRON_LM": ("false", "parallel.strategy"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": ("false", "parallel"),
}


def refuse_foreign_settings(environment: Mapping[str, str]) -> None:
    """Refuse settings of Accelerate's that the run configuration makes: one of the two would be ignored.

    Args:
        environment: this rank's.

    Raises:
        UserError: there is one.
    """
    for name, (neutral, key) in _NEUTRAL.items():
        value = environment.get(name, neutral)
        if value.lower() != neutral:
            raise UserError(
                f"{name}={value} comes from accelerate launch, accelerate config or your environment, but {key} of the "
                f"run configuration decides; take it out there."
            )
