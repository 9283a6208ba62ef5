"""Accelerate's settings beside the run configuration's."""

import pytest

from sharding.ranks.errors import UserError
from trainer.runtime.foreign_settings import refuse_foreign_settings


def test_what_accelerate_sets_where_nobody_asked_is_fine() -> None:
    refuse_foreign_settings({})
    refuse_foreign_settings(
        {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO", "ACCELERATE_USE_CPU": "False"}
    )


@pytest.mark.parametrize(
    ("name", "value", "key"),
    [
        ("ACCELERATE_MIXED_PRECISION", "bf16", "precision.compute"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "compile"),
        ("ACCELERATE_USE_FSDP", "true", "parallel.strategy"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "parallel.strategy"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "batch.global_size"),
    ],
)
def test_a_setting_that_would_be_ignored_is_refused(name: str, value: str, key: str) -> None:
    with pytest.raises(UserError) as refused:
        refuse_foreign_settings({name: value})
    assert str(refused.value).startswith(f"{name}={value} comes from accelerate launch")
    assert f"but {key} of the run configuration decides" in str(refused.value)
