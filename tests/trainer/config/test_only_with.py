"""A setting that belongs to a choice has no effect beside another one, and is refused there."""

from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from pydantic.fields import FieldInfo

from sharding.ranks.errors import UserError
from sharding.strict_model import SET, UNSET, Like, check_choices, conditions, idle_settings
from tests.support import write_config
from trainer.config import RunConfig, config_to_yaml, load_config, load_frozen_config
from trainer.config.data import MixtureSource
from trainer.config.frozen_config import Change, frozen_differences
from trainer.config.reference import section_of, sections
from trainer.config.sections import EvaluationSet

_FREE_NAMES = {"causal-lm", "regression", "my:Task"}


def _base(key: str = "") -> RunConfig:
    """A configuration that has the list of sections which a setting may be in."""
    config = RunConfig.model_validate({"model": {"architecture": "llama"}, "steps": 3})
    if key.startswith("evaluation.sets[]"):
        return _with(config, "evaluation.sets", (EvaluationSet(name="a"),))
    return _with(config, "data.mixture", (MixtureSource(name="a", weight=1.0),)) if "[]" in key else config


def _with(section: Any, path: str, value: Any) -> Any:
    part, _, rest = path.partition(".")
    if part.endswith("[]"):
        elements = getattr(section, part[:-2])
        return section.model_copy(update={part[:-2]: (_with(elements[0], rest, value), *elements[1:])})
    name = next(name for name, field in type(section).model_fields.items() if part == (field.alias or name))
    return section.model_copy(update={name: _with(getattr(section, name), rest, value) if rest else value})


def _field_at(path: str) -> FieldInfo:
    section, _, leaf = path.rpartition(".")
    fields = dict(sections(RunConfig))[section].model_fields
    return next(field for name, field in fields.items() if leaf == (field.alias or name))


def _another(field: FieldInfo) -> Any:
    """A value of a field's kind that is not its default."""
    section, default = section_of(field), field.get_default(call_default_factory=True)
    if section is not None:
        name, inner = next(iter(section.model_fields.items()))
        return default.model_copy(update={name: _another(inner)})
    if get_origin(field.annotation) is Literal:
        return next(value for value in get_args(field.annotation) if value != default)
    if isinstance(default, bool):
        return not default
    if isinstance(default, int | float):
        return default + 1
    return {dict: {"a": 1}, tuple: ("a",)}.get(type(default), "another")


def _values_beside(choices: Any, field: FieldInfo) -> tuple[Any, list[Any]]:
    """A value that is among the choices, and values of the field that are not."""
    unset = next(value for value in (None, field.get_default(call_default_factory=True), 0) if not value)
    if choices in (SET, UNSET):
        set_to = field.get_default(call_default_factory=True) or _another(field)
        return (set_to, [unset]) if choices is SET else (unset, [set_to])
    several = choices if isinstance(choices, tuple) else (choices,)
    forms = [choice.pattern for choice in several if isinstance(choice, Like)]
    values = [choice for choice in several if not isinstance(choice, Like)]
    every = (False, True) if isinstance(several[0], bool) else get_args(field.annotation) or _FREE_NAMES | set(values)
    others = [value for value in every if value not in values and not any(fnmatch(value, form) for form in forms)]
    assert set(values) <= set(every), "each choice is a value of its field"
    assert others, "the field has others"
    return several[0].shown if isinstance(several[0], Like) else several[0], others


def _conditions() -> Iterator[tuple[str, list[tuple[str, Any]]]]:
    """Every setting with conditions: its key, and dotted path and choices of each."""
    for section_key, model in sections(RunConfig):
        for name, field in model.model_fields.items():
            found = [
                (path if "." in path or not section_key else f"{section_key}.{path}", choices)
                for _, path, choices in conditions(field)
            ]
            if found:
                yield f"{section_key}.{field.alias or name}".lstrip("."), found


@pytest.mark.parametrize(("key", "needed"), [*_conditions()], ids=lambda value: value if isinstance(value, str) else "")
def test_a_setting_is_refused_beside_another_choice(key: str, needed: list[tuple[str, Any]]) -> None:
    config = _with(_base(key), key, _another(_field_at(key)))
    around = [condition for other, others in _conditions() if key.startswith(f"{other}.") for condition in others]
    for path, choices in [*around, *needed]:
        config = _with(config, path, _values_beside(choices, _field_at(path))[0])
    shown_key = key.replace("[]", ".0")
    assert shown_key not in {idle.key for idle in idle_settings(config)}
    for path, choices in needed:
        for value in _values_beside(choices, _field_at(path))[1]:
            refused = _with(config, path, value)
            # Where a whole list of sections is idle, what is in it is as well.
            idle = next(idle for idle in idle_settings(refused) if f"{shown_key}.".startswith(f"{idle.key}."))
            sentence = idle.sentence()
            assert sentence.startswith(idle.key)
            assert " goes with" in sentence
            assert path.replace("[]", ".0") in sentence
            assert f"remove {idle.key}, or " in sentence
            with pytest.raises(UserError, match=" goes with"):
                check_choices(refused)
            at_default = _with(refused, key, _field_at(key).get_default(call_default_factory=True))
            assert [idle.changed for idle in idle_settings(at_default) if idle.key == shown_key] in ([None], [])


def test_there_are_such_settings() -> None:
    keys = {key for key, _ in _conditions()}
    assert {"optimizer.muon", "checkpoint.load", "data.hub_split", "data.mixture[].hub_split"} <= keys
    assert len(keys) > 40


def test_defaults_pass_and_only_own_names_are_idle() -> None:
    check_choices(_base())
    assert "optimizer.betas" not in {idle.key for idle in idle_settings(_base())}
    assert "optimizer.momentum" in {idle.key for idle in idle_settings(_base())}


def test_what_an_earlier_release_let_stand_without_effect_keeps_no_run_from_going_on(
    tmp_path: Path, values: dict[str, Any]
) -> None:
    config = load_config(write_config(tmp_path / "tiny.yaml", values))
    frozen = tmp_path / "frozen.yaml"
    frozen.write_text(config_to_yaml(_with(_with(config, "data.hub_split", "other"), "optimizer.momentum", 0.5)))
    with pytest.raises(UserError, match=r"data\.hub_split=other goes with data\.source=hub only"):
        load_config(frozen)
    assert frozen_differences(load_frozen_config(frozen), config) == []
    assert frozen_differences(load_frozen_config(frozen), _with(config, "optimizer.name", "sgd")) == [
        Change("optimizer.momentum", 0.5, 0.9),
        Change("optimizer.name", "adamw", "sgd"),
    ]
