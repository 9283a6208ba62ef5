"""docs/configuration.md from the configuration models.

``python -m trainer.config_docs`` writes the page; with ``--check`` it only says whether the page is current.
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from trainer.config import RunConfig

PAGE = Path(__file__).resolve().parent.parent / "docs" / "configuration.md"

_INTRODUCTION = """# Configuration

A run is described by one YAML file. Any setting can be given on the command line too, as `section.key=value` behind the
file; a value is read as YAML. An unknown key, a wrong type and a setting that contradicts another are errors before
anything starts. Where a count of steps may be 0, 0 means "off" or "only at the end".

This page is made from the configuration models by `python -m trainer.config_docs`.
"""


def render_page() -> str:
    """The whole page."""
    parts = [_INTRODUCTION]
    for path, model in sections(RunConfig):
        title = f"## `{path}`" if path else "## Top level"
        rows = [_row(path, name, field) for name, field in model.model_fields.items() if _section(field) is None]
        header = "| key | type | default | meaning |\n|---|---|---|---|"
        parts.append("\n".join([title, "", " ".join((model.__doc__ or "").split()), "", header, *rows]) + "\n")
    return "\n".join(parts)


def sections(model: type[BaseModel], path: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """Each section's dotted path and model, outer before inner, the top level first under an empty path."""
    yield path, model
    for name, field in model.model_fields.items():
        inner = _section(field)
        if inner is not None:
            yield from sections(inner, f"{path}.{name}" if path else name)


def _section(field: FieldInfo) -> type[BaseModel] | None:
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _row(path: str, name: str, field: FieldInfo) -> str:
    key = field.alias or name
    full = f"{path}.{key}" if path else key
    default = "required" if field.is_required() else f"`{_plain(field.default)}`"
    meaning = " ".join((field.description or "").split())
    return f"| `{full}` | {_type_name(field.annotation)} | {default} | {meaning} |"


def _plain(value: Any) -> str:
    """A default as it would stand in YAML."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return str(list(value)) if isinstance(value, tuple) else str(value)


def _type_name(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(kind))
    arguments = [argument for argument in get_args(kind) if argument is not type(None)]
    if type(None) in get_args(kind):
        return f"{_type_name(arguments[0])} or null"
    if get_origin(kind) is tuple:
        return f"list of {_type_name(arguments[0])}"
    if get_origin(kind) is dict:
        return "mapping"
    return {int: "integer", float: "number", str: "text", bool: "true or false"}[kind]


def main(arguments: Sequence[str]) -> int:
    """Write or check the page; returns the exit status."""
    page = render_page()
    if "--check" in arguments:
        if PAGE.exists() and PAGE.read_text() == page:
            return 0
        print(f"error: {PAGE} is not current; run python -m trainer.config_docs", file=sys.stderr)
        return 1
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
