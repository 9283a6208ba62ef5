"""From a file and overrides to a checked RunConfig, and back to YAML."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import ValidationError

from sharding.ranks.errors import UserError
from trainer.config.earlier_spellings import forget_replaced, note_earlier_spelling, with_present_spelling
from trainer.config.expansion import escape_settings, expand_argument, expand_settings
from trainer.config.messages import with_messages
from trainer.config.rows_rules import with_kind_of_samples
from trainer.config.rules import validate
from trainer.config.schema import OWN_MODULES, RunConfig
from trainer.config.secrets import refuse_secrets
from trainer.config.setting_hints import list_hint, setting_hint, value_hint
from trainer.config.yaml_files import YamlError, dump_yaml, parse_yaml, read_yaml_mapping

OwnNames = Mapping[str, tuple[str, str | None]]
"""By section ``module:object`` of what is a caller's own, and the folder of its module; None where it is installed."""


def load_config(
    source: str | Path | Mapping[str, Any] | RunConfig,
    overrides: Sequence[str] = (),
    own: OwnNames = MappingProxyType({}),
) -> RunConfig:
    """Read settings, apply ``key.sub=value`` overrides and check the result.

    Args:
        source: a YAML file, nested settings as one has them, or a configuration that is to be changed.
        overrides: settings in place of those.
        own: what is to be named in sections that may name something of the user's own.

    Raises:
        UserError: the file cannot be read or parsed, a key is unknown, or a value is wrong or a secret, or a path names
            a variable that is not set; or a section names something else than is given for it.
    """
    if isinstance(source, RunConfig) and not (overrides or own):
        return source
    origin = "the configuration" if isinstance(source, Mapping | RunConfig) else expand_argument(str(source))
    values = _read_values(source, origin)
    forget_replaced(values, overrides)
    for override in overrides:
        _apply_override(values, override)
    expand_settings(values)
    _put_own(values, own)
    if isinstance(source, str | Path):
        _find_modules(values, Path(origin))
    config = parse_config(values, source=origin)
    note_earlier_spelling(values, origin)
    refuse_secrets(config.model_dump(mode="json"), os.environ)
    return config


def load_frozen_config(path: Path) -> RunConfig:
    """Read what an attempt was frozen with, for whoever looks at it or compares it.

    Rules that have come since are for what starts now: what an earlier release has trained can still be listed,
    exported and continued with other settings.

    Raises:
        UserError: the file cannot be read, or this release does not know a setting.
    """
    values = read_yaml_mapping(path)
    expand_settings(values)
    return parse_config(values, source=str(path), has_rules=False)


def parse_config(values: dict[str, Any], source: str, *, has_rules: bool = True) -> RunConfig:
    """Turn plain values into a checked RunConfig.

    Args:
        values: nested mapping as read from YAML.
        source: what to call the origin of the values in an error.
        has_rules: whether rules that span several settings are applied; see ``load_frozen_config``.

    Raises:
        UserError: a key is unknown or a value is wrong; every problem is named.
    """
    try:
        config = RunConfig.model_validate(with_present_spelling(values))
    except ValidationError as error:
        problems = [_describe(problem) for problem in error.errors()]
        raise UserError(f"{source}: " + "\n".join(problems)) from None
    config = _with_mask_token(_with_own_tokenizer(config))
    data = with_messages(with_kind_of_samples(config.data, config.task.name))
    if data is not config.data:
        config = config.model_copy(update={"data": data})
    if has_rules:
        validate(config)
    return config


def _with_own_tokenizer(config: RunConfig) -> RunConfig:
    """A pretrained model reads the tokenizer that it was trained with, unless another one is named."""
    is_given = "tokenizer" in config.data.model_fields_set or not config.data.has_tokens
    if config.model.pretrained is None or is_given:
        return config
    data = config.data.model_copy(update={"tokenizer": config.model.pretrained})
    return config.model_copy(update={"data": data})


def _with_mask_token(config: RunConfig) -> RunConfig:
    """Masked language modelling has a token that hides others, unless it is said otherwise."""
    if config.task.name != "masked-lm" or not config.data.has_tokens or "mask_token" in config.data.model_fields_set:
        return config
    data = config.data.model_copy(update={"mask_token": True})
    return config.model_copy(update={"data": data})


def config_to_yaml(config: RunConfig) -> str:
    """The whole configuration as YAML that load_config reads back to an equal one; paths as they are, without ~."""
    values = config.model_dump(mode="json")
    escape_settings(values)
    return dump_yaml(values)


def _read_values(source: str | Path | Mapping[str, Any] | RunConfig, origin: str) -> dict[str, Any]:
    """Nested settings as YAML has them, for the caller to change."""
    if isinstance(source, RunConfig):
        values = source.model_dump(mode="json", exclude_unset=True)
        escape_settings(values)
        return values
    if isinstance(source, Mapping):
        return {str(key): _plain(value, str(key)) for key, value in source.items()}
    return read_yaml_mapping(Path(origin))


def _plain(value: Any, key: str) -> Any:
    """A value as YAML has it.

    Raises:
        UserError: YAML has no such values.
    """
    if isinstance(value, Mapping):
        return {str(name): _plain(inner, f"{key}.{name}") for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner, f"{key}.{index}") for index, inner in enumerate(value)]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if value is None or isinstance(value, bool):
        return value
    # Of a class of its own, such as one of NumPy's, it would not be written.
    for kind in (int, float, str):
        if isinstance(value, kind):
            return kind(value)
    raise UserError(
        f"{key}={value!r} is a {type(value).__name__}, which no configuration file can hold; write a number, a text, a "
        "list or a mapping."
    )


def _put_own(values: dict[str, Any], own: OwnNames) -> None:
    """Name in each section what is the caller's own.

    Raises:
        UserError: the section names something else.
    """
    for key, setting in OWN_MODULES:
        if key not in own:
            continue
        name, folder = own[key]
        section = values.get(key) or {}
        named = {setting: name, **({"source": "factory"} if key == "data" else {})}
        if not isinstance(section, dict):
            # For validation to name.
            continue
        for leaf, value in named.items():
            if section.get(leaf, value) != value:
                raise UserError(
                    f"{key}.{leaf}={section[leaf]}, but {name} was given in its place; leave one of them out."
                )
        # Also where it has none: then it is installed, and what lies beside a file is another.
        values[key] = {**section, **named, "folder": folder}


def _find_modules(values: dict[str, Any], path: Path) -> None:
    """Write down where modules of the user's own lie, for whoever reads a copy of the configuration."""
    for key, name in OWN_MODULES:
        section = values.get(key)
        # A copy says so itself, also where it has none.
        if not isinstance(section, dict) or "folder" in section:
            continue
        module, colon, _ = str(section.get(name, "")).partition(":")
        folder, top = path.absolute().parent, module.partition(".")[0]
        if colon and ((folder / f"{top}.py").is_file() or (folder / top).is_dir()):
            values[key] = {**section, "folder": str(folder)}


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UserError(f"{override!r} is not an override; write key.sub=value, for example optimizer.lr=1e-3.")
    node: Any = values
    *parents, leaf = key.split(".")
    for index, parent in enumerate(parents):
        node = _child(node, parent, ".".join(parents[:index]), override)
    if not isinstance(node, dict):
        raise UserError(f"{override!r}: {'.'.join(parents)} is a list; write {'.'.join(parents)}=[...].")
    try:
        node[leaf] = parse_yaml(text)
    except YamlError as error:
        raise UserError(f"{override!r}: the value is not YAML ({error}); quote it.") from None


def _child(node: Any, name: str, key: str, override: str) -> Any:
    """The section of this name, made if need be, or the element of a list by its number."""
    if isinstance(node, list):
        if not (name.isdigit() and int(name) < len(node)):
            raise UserError(f"{override!r}: {key} is a list of {len(node)}; name one by its number, from 0.")
        child = node[int(name)]
    else:
        if node.get(name) is None:
            node[name] = {}
        child = node[name]
    if not isinstance(child, dict | list):
        raise UserError(f"{override!r}: {name} is a value, not a section; write {name}=value.")
    return child


def _describe(problem: Any) -> str:
    location = [str(part) for part in problem["loc"]]
    key = ".".join(location)
    if problem["type"] == "extra_forbidden":
        return f"unknown key {key}{setting_hint(location, RunConfig)}"
    if problem["type"] == "missing":
        return f"{key} is missing; set it in the file or with {key}=VALUE."
    if problem["type"] == "model_type":
        return f"{key}={problem['input']!r} is a value, but {key} is a section of settings."
    message, value = problem["msg"], problem["input"]
    hint = ""
    if problem["type"] == "literal_error":
        choices = re.findall(r"'([^']*)'", problem["ctx"]["expected"])
        hint = value_hint(key, value, choices)
    elif problem["type"] in ("tuple_type", "list_type") and isinstance(value, str | int | float):
        hint = list_hint(key, value)
    return f"{key}={value!r}: {message[:1].lower()}{message[1:]}{hint or '.'}"
