"""YAML as people write it: safe, no duplicate keys, merge keys, and 3e-4 is a number."""

import re
from pathlib import Path
from typing import Any

import yaml

from sharding.ranks.errors import UserError

_LONGEST_REASON = 200


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # Before merge keys (<<) are resolved, which puts what is merged beside what is given in its place.
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key_node, _ in node.value:
            key = (key_node.tag, str(key_node.value))
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key_node.value!r} is given twice", key_node.start_mark
                )
            seen.add(key)
        return node


# YAML 1.1 takes 3e-4 for a string, since it demands a dot and a signed exponent in a float.
class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes texts which our loader would take for numbers."""


for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\d[\d_]*(\.[\d_]*)?|\.\d[\d_]*)[eE][-+]?\d+$"),
        list("-+.0123456789"),
    )


def dump_yaml(values: Any) -> str:
    """Plain values as YAML that ``parse_yaml`` reads back to equal ones."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False)


def parse_yaml(text: str) -> Any:
    """Parse one YAML document.

    Raises:
        yaml.YAMLError: the text is not YAML, names a key twice, has a value that its kind does not know, such as
            ``2024-01-01T99:00:00Z``, or contains itself.
    """
    try:
        values = yaml.load(text, Loader=_Loader)  # noqa: S506 - _Loader is a SafeLoader
        _refuse_cycles(values, ())
    except yaml.YAMLError:
        raise
    except RecursionError:
        raise yaml.constructor.ConstructorError(None, None, "it is nested too deep") from None
    except Exception as error:  # noqa: BLE001 - a value's own constructor raises what it likes
        reason = " ".join(str(error).split())[:_LONGEST_REASON]
        raise yaml.constructor.ConstructorError(None, None, f"a value cannot be read ({reason})") from None
    return values


def _refuse_cycles(value: Any, above: tuple[int, ...]) -> None:
    if not isinstance(value, dict | list):
        return
    if id(value) in above:
        raise yaml.constructor.ConstructorError(None, None, "an anchor contains itself")
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
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{place}: not valid YAML: {getattr(error, 'problem', error)}; mend the file.") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path}: the top level is {type(values).__name__}, but must be a mapping of settings.")
    return {key: value for key, value in values.items() if not str(key).startswith("x-")}
