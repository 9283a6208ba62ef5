"""The bases of configuration sections and of what programs write down."""

import enum
import functools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Self, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator
from pydantic.fields import FieldInfo

from sharding.ranks.errors import UserError


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

    @classmethod
    def read(cls, path: Path) -> Self | None:
        """The record in a JSON file; None where there is none, half of one, or one of another kind or release."""
        try:
            return cls.model_validate_json(path.read_bytes())
        except (OSError, ValidationError):
            return None


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


class _Presence(enum.Enum):
    SET = enum.auto()
    UNSET = enum.auto()


SET = _Presence.SET
"""As a choice of ``OnlyWith``: anything but null, false, 0 and what is empty."""
UNSET = _Presence.UNSET
"""As a choice of ``OnlyWith``: null, false, 0, or empty."""


@dataclass(frozen=True)
class Like:
    """As a choice of ``OnlyWith``: all texts of one form.

    Attributes:
        pattern: shell pattern of the form.
        shown: what to call the form.
    """

    pattern: str
    shown: str


class OnlyWith:
    """Says at a field under which choices it has an effect; set beside another choice it is refused.

    Every keyword names another field of the same section, its value the choice, or a tuple of choices, that the field
    goes with; all must hold. Fields of other sections are given by dotted path in a mapping. A choice is a value, a
    ``Like``, or one of ``SET`` and ``UNSET`` alone::

        class OptimizerConfig(StrictModel):
            name: Literal["adamw", "sgd", "muon"] = "adamw"

            betas: Annotated[tuple[float, float], OnlyWith(name=("adamw", "muon"))] = (0.9, 0.95)

            nesterov: Annotated[bool, OnlyWith(name="sgd", momentum=SET)] = False

            average: Annotated[float, OnlyWith({"parallel.backend": "torch"}, because="others hide weights")] = 0.0

    ``check_choices``, which the rules of a run call, refuses a value other than the default where a choice does not
    hold. A whole section is such a field as well. The reference of settings shows the choices, so a docstring need not.
    """

    def __init__(self, others: Mapping[str, Any] | None = None, /, *, because: str = "", **own: Any) -> None:
        """Take choices by the names that users write.

        Args:
            others: dotted path to choices, for fields of other sections.
            because: why the field goes with these alone, as the end of a sentence.
            own: field of the same section to choices.
        """
        self.choices: dict[str, Any] = {**own, **(others or {})}
        self.because = because


@dataclass(frozen=True)
class IdleSetting:
    """A setting that has no effect, since a choice that it goes with is not made.

    Attributes:
        key: its dotted path.
        changed: ``key=value`` of the first value in it that differs from its default; None where none does.
        choice_key: dotted path of the choice.
        choices: what it goes with, as ``OnlyWith`` has it.
        found: what was chosen.
        because: the reason, if one is given.
    """

    key: str
    changed: str | None
    choice_key: str
    choices: Any
    found: Any
    because: str

    def sentence(self) -> str:
        """What is wrong about it, and what to do."""
        key, found = self.choice_key, _shown(self.found)
        if self.choices is SET:
            needed, remedy = f"with {key} only, which is {'not set' if self.found is None else found}", f"set {key}"
        elif self.choices is UNSET:
            needed, remedy = f"without {key} only, but it is {found}", f"remove {key}"
        else:
            names = choice_names(self.choices)
            needed = f"with {key}={or_list(names)} only, but it is {found}"
            remedy = f"set {key}={names[0]}" if len(names) == 1 else f"set {key} to one of these"
        reason = f": {self.because}" if self.because else ""
        return f"{self.changed} goes {needed}{reason}; remove {self.key}, or {remedy}."


def check_choices(config: StrictModel) -> None:
    """Check that every setting in a configuration has the choices that it goes with, or its default.

    Raises:
        UserError: one has not.
    """
    for idle in idle_settings(config):
        if idle.changed is not None:
            raise UserError(idle.sentence())


def idle_settings(config: StrictModel) -> Iterator[IdleSetting]:
    """All settings of a whole configuration that have no effect, also those at their defaults."""
    yield from _idle_in(config, "", config)


def _idle_in(section: StrictModel, prefix: str, root: StrictModel) -> Iterator[IdleSetting]:
    for name, field in type(section).model_fields.items():
        key, value = f"{prefix}{field.alias or name}", getattr(section, name)
        for condition, path, choices in conditions(field):
            is_own = "." not in path
            found = _value_at(section if is_own else root, path)
            if not _is_among(found, choices):
                changed = _first_change(key, field, value)
                yield IdleSetting(key, changed, f"{prefix if is_own else ''}{path}", choices, found, condition.because)
                break
        else:
            inner = enumerate(value) if isinstance(value, tuple) else [("", value)]
            for index, element in inner:
                if isinstance(element, StrictModel):
                    yield from _idle_in(element, f"{key}.{index}." if index != "" else f"{key}.", root)


def conditions(field: FieldInfo) -> Iterator[tuple[OnlyWith, str, Any]]:
    """Every condition of a field, the path in it, and the choices that it goes with there."""
    for condition in field.metadata:
        if isinstance(condition, OnlyWith):
            for path, choices in condition.choices.items():
                yield condition, path, choices


def choice_names(choices: Any) -> list[str]:
    """The values among choices, as users write them."""
    several = choices if isinstance(choices, tuple) else (choices,)
    return [choice.shown if isinstance(choice, Like) else _shown(choice) for choice in several]


def or_list(words: list[str]) -> str:
    """Words as ``a, b or c``."""
    return " or ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def _is_among(value: Any, choices: Any) -> bool:
    if isinstance(choices, _Presence):
        return bool(value) == (choices is SET)
    return any(
        fnmatchcase(str(value), choice.pattern) if isinstance(choice, Like) else value == choice
        for choice in (choices if isinstance(choices, tuple) else (choices,))
    )


def _value_at(section: Any, path: str) -> Any:
    for part in path.split("."):
        fields = type(section).model_fields
        section = getattr(section, next(name for name, field in fields.items() if part == (field.alias or name)))
    return section


def _first_change(key: str, field: FieldInfo, value: Any) -> str | None:
    if value == field.get_default(call_default_factory=True):
        return None
    if isinstance(value, StrictModel):
        changes = (
            _first_change(f"{key}.{inner.alias or name}", inner, getattr(value, name))
            for name, inner in type(value).model_fields.items()
        )
        return next(filter(None, changes), None)
    if isinstance(value, tuple) and value and isinstance(value[0], StrictModel):
        return key
    if isinstance(value, dict) and value:
        name, inner_value = next(iter(value.items()))
        return f"{key}.{name}={_shown(inner_value)}"
    return f"{key}={_shown(value)}"


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
