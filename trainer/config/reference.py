"""docs/configuration.md, written from the configuration models themselves.

``python -m trainer.config.reference [--check]``; with ``--check`` nothing is written, and the exit status is 1
where the page is out of date.
"""

import inspect
import json
import sys
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from sharding.strict_model import SET, UNSET, StrictModel, choice_names, conditions, or_list
from trainer.config.expansion import PATH_SETTINGS
from trainer.config.schema import RunConfig

PAGE = Path(__file__).resolve().parents[2] / "docs" / "configuration.md"

_HEADER = """\
# Configuration

<!-- Written by `python -m trainer.config.reference` from the models in the code; change it there. -->

A run is one YAML file. `key.sub=value` arguments of any command that takes a configuration override the file:

    shardline run configs/quickstart.yaml steps=100 optimizer.lr=1e-3

What neither names has the default below. An unknown key, a wrong type and a combination that cannot work are errors
before anything starts; the message names the key, its value and what to do. A key without a default must be set. One
that goes with a choice only is refused beside another choice, unless it has its default.

Integers may be written as `1e9`. Anchors and merge keys (`<<: *base`) work; a top-level key `x-...` is left out, so
that a part to be merged can stand there.

In {paths} a leading `~` and `$NAME` or `${{NAME}}` are
replaced, as in paths on the command line; a variable that is not set is an error, and `$$` is a dollar sign. The run's
frozen `config.yaml` has what came of it: whoever continues, exports or looks at the run from there reaches the same
files, under another name and home too. So your own file continues the run where `~` and the variables are what they
were; elsewhere take `RUN/config.yaml`, and `output_dir=` if the folder has moved.
""".format(paths=", ".join(f"`{key}`" for key in PATH_SETTINGS))
_KINDS = {int: "integer", float: "number", str: "text", bool: "true or false", dict: "mapping", type(None): "null"}
_BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


def render_page() -> str:
    """The whole page."""
    parts = [_HEADER]
    for key, model in sections(RunConfig):
        title = f"`{key}`" if key else "Top level"
        parts.append(f"\n## {title}\n\n{_one_line(inspect.getdoc(model) or '')}\n")
        parts.append("\n| key | type | default | meaning |\n| --- | --- | --- | --- |\n")
        parts += [_row(key, name, field) for name, field in model.model_fields.items()]
    return "".join(parts)


def sections(
    model: type[StrictModel], key: str = "", seen: set[type[StrictModel]] | None = None
) -> Iterator[tuple[str, type[StrictModel]]]:
    """A model and all sections in it, with their dotted keys; the model itself has the empty key.

    An element of a list of sections has the list's key with ``[]``. A section that comes again, as in stages, is there
    once.
    """
    seen = set() if seen is None else seen
    if model in seen:
        return
    seen.add(model)
    yield key, model
    for name, field in model.model_fields.items():
        section, element = section_of(field), element_of(field)
        if section is not None:
            yield from sections(section, _join(key, field.alias or name), seen)
        if element is not None:
            yield from sections(element, f"{_join(key, field.alias or name)}[]", seen)


def section_of(field: FieldInfo) -> type[StrictModel] | None:
    """The model of a field that is a section, also of one that may be null; None for a field that is a value."""
    kinds = [kind for kind in get_args(field.annotation) if kind is not type(None)]
    kind = kinds[0] if len(kinds) == 1 and type(None) in get_args(field.annotation) else field.annotation
    return kind if inspect.isclass(kind) and issubclass(kind, StrictModel) else None


def element_of(field: FieldInfo) -> type[StrictModel] | None:
    """The model of a field that is a list of sections."""
    kind = get_args(field.annotation)[0] if get_origin(field.annotation) in (tuple, list) else None
    return kind if inspect.isclass(kind) and issubclass(kind, StrictModel) else None


def _row(section_key: str, name: str, field: FieldInfo) -> str:
    key = _join(section_key, field.alias or name)
    if section_of(field) is not None:
        kind, default = "section", "see below" if field.default is not None else "`null`"
    elif element_of(field) is not None:
        kind, default = "list of sections, see below", _default(field)
    else:
        kind, default = _kind(field.annotation) + _bounds(field), _default(field)
    cells = (f"`{key}`", kind, default, _one_line(field.description or "") + _conditions(section_key, field))
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def _conditions(section_key: str, field: FieldInfo) -> str:
    """The choices that a setting goes with, as a sentence; empty where it always has an effect."""
    needed = []
    for _, path, choices in conditions(field):
        key = path if "." in path else _join(section_key, path)
        values = "" if choices in (SET, UNSET) else f" {or_list([f'`{name}`' for name in choice_names(choices)])}"
        needed.append(f"{'without' if choices is UNSET else 'with'} `{key}`{values}")
    return f" Goes {' and '.join(needed)} only." if needed else ""


def _kind(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _kind(arguments[0])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(_kind(argument) for argument in arguments)
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            return f"list of {_kind(arguments[0])}"
        return f"list of {len(arguments)} {_kind(arguments[0])}s"
    return _KINDS[origin or annotation]


def _bounds(field: FieldInfo) -> str:
    found = []
    for constraint in field.metadata:
        if getattr(constraint, "pattern", None):
            found.append(f"`{constraint.pattern}`")
        for attribute, sign in _BOUNDS.items():
            value = getattr(constraint, attribute, None)
            if value is not None:
                found.append(f"{sign} {_number(value)}")
    return "".join(f", {bound}" for bound in found)


def _number(value: float) -> str:
    return "2^63" if value == 2**63 else f"{value:g}" if isinstance(value, float) else str(value)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "must be set"
    value = field.get_default(call_default_factory=False)
    if isinstance(value, float):
        return f"`{value:g}`"
    if isinstance(value, str):
        return f"`{value}`"
    return f"`{json.dumps(value)}`"


def _join(section_key: str, name: str) -> str:
    return f"{section_key}.{name}" if section_key else name


def _one_line(text: str) -> str:
    return " ".join(text.split())


def main(arguments: Sequence[str]) -> int:
    """Write the page, or compare it; returns the exit status."""
    page = render_page()
    if "--check" in arguments:
        if not PAGE.exists() or PAGE.read_text() != page:
            print(
                f"error: {PAGE} is out of date; write it anew with python -m trainer.config.reference", file=sys.stderr
            )
            return 1
        return 0
    PAGE.write_text(page)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
