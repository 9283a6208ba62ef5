"""The bases of configuration sections and of what programs write down."""

import functools
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator


class StrictModel(BaseModel):
    """A configuration section: unknown keys and wrong types are errors, and nothing changes after loading.

    No number is infinite, and no text is empty: what is not set is null.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        str_min_length=1,
    )

    @field_validator("*", mode="before")
    @classmethod
    def _whole_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        """``tokens: 1e9``, which YAML has for a float, is the integer that it equals."""
        return _as_integers(value) if _takes_integers_alone(cls, info.field_name or "") else value


class StrictRecord(StrictModel):
    """What a program writes down and reads again: as strict about keys and types, but it holds whatever came out.

    An error may say nothing, and a record of it must not fail for that.
    """

    model_config = ConfigDict(allow_inf_nan=True, str_min_length=0)


@functools.cache
def _takes_integers_alone(model: type[BaseModel], name: str) -> bool:
    kinds = _kinds(model.model_fields[name].annotation)
    return int in kinds and float not in kinds


def _kinds(annotation: Any) -> set[Any]:
    """A type and all that it is made of."""
    return {annotation}.union(*(_kinds(part) for part in get_args(annotation)))


def _as_integers(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return [_as_integers(item) for item in value] if isinstance(value, list) else value
