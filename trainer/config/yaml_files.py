"""YAML as people write it: safe, no duplicate keys, merge keys, and 3e-4 is a number. The one place with a library."""

import io
import re
import sys
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.composer import Composer
from ruamel.yaml.constructor import SafeConstructor
from ruamel.yaml.error import YAMLError
from ruamel.yaml.nodes import MappingNode, ScalarNode
from ruamel.yaml.representer import SafeRepresenter
from ruamel.yaml.resolver import VersionedResolver
from ruamel.yaml.tag import Tag

from sharding.ranks.errors import UserError

_LONGEST_REASON = 200
_EXPONENT = re.compile(r"[-+]?(\d[\d_]*(\.[\d_]*)?|\.\d[\d_]*)[eE][-+]?\d+", re.ASCII)
_WORD_VALUES = r"yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF"
# What a plain text is, by the first pattern that it matches whole: YAML 1.1, in which earlier releases have written
# the configurations of runs (so on and no are true and false), and 3e-4, for which YAML 1.1 demands 3.0e-4.
_KINDS = tuple(
    (f"tag:yaml.org,2002:{kind}", re.compile(pattern, re.ASCII))
    for kind, pattern in (
        ("bool", _WORD_VALUES),
        ("float", _EXPONENT.pattern),
        ("float", r"[-+]?\d[\d_]*\.[\d_]*|\.\d[\d_]*|[-+]?\d[\d_]*(:[0-5]?\d)+\.[\d_]*"),
        ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"),
        ("int", r"[-+]?(0b[01_]+|0[0-7_]+|0|[1-9][\d_]*|0x[\da-fA-F_]+|[1-9][\d_]*(:[0-5]?\d)+)"),
        ("merge", "<<"),
        ("null", "~|null|Null|NULL|"),
        ("timestamp", r"\d{4}-\d\d-\d\d"),
        (
            "timestamp",
            r"\d{4}-\d\d?-\d\d?([Tt]|[ \t]+)\d\d?:\d\d:\d\d(\.\d*)?([ \t]*(Z|[-+]\d\d?(:\d\d)?))?",
        ),
        ("value", "="),
    )
)


class YamlError(Exception):
    """A text is not YAML, or not as we take it.

    Attributes:
        line: where, from 1; None where that is not known.
    """

    def __init__(self, reason: str, line: int | None = None) -> None:
        super().__init__(reason)
        self.line = line


class _Resolver(VersionedResolver):
    """Knows plain texts by ``_KINDS``, when they are read and when it is asked whether one must be quoted."""

    @property
    def processing_version(self) -> tuple[int, int]:
        return 1, 1

    def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
        if kind is not ScalarNode:
            return super().resolve(kind, value, implicit)
        known = (tag for tag, pattern in _KINDS if implicit[0] and pattern.fullmatch(value))
        return Tag(suffix=next(known, "tag:yaml.org,2002:str"))


class _Composer(Composer):
    """Composer that refuses a key given twice."""

    def compose_mapping_node(self, anchor: Any) -> MappingNode:
        # Before merge keys (<<) are resolved, which puts what is merged beside what is given in its place.
        node: MappingNode = super().compose_mapping_node(anchor)
        seen = set()
        for key_node, _ in node.value:
            key = (str(key_node.tag), str(key_node.value))
            if key in seen:
                raise YamlError(f"the key {key_node.value!r} is given twice", key_node.start_mark.line + 1)
            seen.add(key)
        return node


class _Constructor(SafeConstructor):
    """SafeConstructor that takes 3e-4 without a warning."""

    def construct_yaml_float(self, node: ScalarNode) -> float:
        text = self.construct_scalar(node)
        return float(text.replace("_", "")) if _EXPONENT.fullmatch(text) else super().construct_yaml_float(node)


_Constructor.add_default_constructor("float")


class _Representer(SafeRepresenter):
    """SafeRepresenter that writes 3.0e-04, so that any reader of YAML has it for a number."""

    def represent_float(self, data: float) -> ScalarNode:
        node: ScalarNode = super().represent_float(data)
        if "e" in node.value and "." not in node.value:
            node.value = node.value.replace("e", ".0e")
        return node


_Representer.add_representer(float, _Representer.represent_float)


def _yaml() -> YAML:
    # A new one for each text, since one that has failed may keep what it had read.
    yaml = YAML(typ="safe", pure=True)
    yaml.Resolver, yaml.Composer, yaml.Constructor, yaml.Representer = _Resolver, _Composer, _Constructor, _Representer
    yaml.default_flow_style, yaml.allow_unicode = False, False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    # Folded, a text in double quotes may be read back with a space more.
    yaml.width = sys.maxsize
    return yaml


def dump_yaml(values: Any) -> str:
    """Plain values as YAML that ``parse_yaml`` reads back to equal ones."""
    text = io.StringIO()
    _yaml().dump(values, text)
    return text.getvalue()


def parse_yaml(text: str) -> Any:
    """Parse one YAML document.

    Raises:
        YamlError: the text is not YAML, names a key twice, has a value that its kind does not know, such as
            ``2024-01-01T99:00:00Z``, or contains itself.
    """
    try:
        values = _yaml().load(text)
        _refuse_cycles(values, ())
    except YamlError:
        raise
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        reason = getattr(error, "problem", None) or str(error)
        raise YamlError(_shortened(reason), mark.line + 1 if mark else None) from None
    except RecursionError:
        raise YamlError("it is nested too deep") from None
    except Exception as error:  # noqa: BLE001 - a value's own constructor raises what it likes
        raise YamlError(f"a value cannot be read ({_shortened(str(error))})") from None
    return values


def _shortened(reason: str) -> str:
    return " ".join(reason.split())[:_LONGEST_REASON]


def _refuse_cycles(value: Any, above: tuple[int, ...]) -> None:
    if not isinstance(value, dict | list):
        return
    if id(value) in above:
        raise YamlError("an anchor contains itself")
    for entry in value.values() if isinstance(value, dict) else value:
        _refuse_cycles(entry, (*above, id(value)))


def read_yaml_mapping(path: Path) -> dict[str, Any]:
    """Read a YAML file whose top level is a mapping; what it calls ``x-...`` is for its own anchors, and left out.

    Raises:
        UserError: the file is missing, unreadable, not YAML or not a mapping.
    """
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        # ValueError is of a path with a null byte; that it is no UTF-8 is one as well.
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text, or no path"
        raise UserError(f"cannot read the configuration {path}: {reason}; check the path.") from None
    except YamlError as error:
        place = f" line {error.line}" if error.line else ""
        raise UserError(f"{path}{place}: not valid YAML: {error}; mend the file.") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path}: the top level is {type(values).__name__}, but must be a mapping of settings.")
    return {key: value for key, value in values.items() if not str(key).startswith("x-")}
