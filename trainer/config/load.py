"""From a file and overrides to a checked RunConfig, and back to YAML."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
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


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file, apply ``key.sub=value`` overrides and check the result.

    Raises:
        UserError: the file cannot be read or parsed, a key is unknown, or a value is wrong or a secret, or a path names
            a variable that is not set.
    """
    path = expand_argument(str(path))
    values = read_yaml_mapping(Path(path))
    forget_replaced(values, overrides)
    for override in overrides:
        _apply_override(values, override)
    expand_settings(values)
    _find_modules(values, Path(path))
    config = parse_config(values, source=path)
    note_earlier_spelling(values, path)
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
    node = values
    *parents, leaf = key.split(".")
    for parent in parents:
        if node.get(parent) is None:
            node[parent] = {}
        node = node[parent]
        if not isinstance(node, dict):
            raise UserError(f"{override!r}: {parent} is a value, not a section; write {parent}=value.")
    try:
        node[leaf] = parse_yaml(text)
    except YamlError as error:
        raise UserError(f"{override!r}: the value is not YAML ({error}); quote it.") from None


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
