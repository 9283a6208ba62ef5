"""What a committed result says, found by a field's name: in its tables, its sentences, or its JSON.

A page names a field by what a reader sees in the file. In ``scaling.md`` it is ``zero3 | shardline bucketed | ratio to
plain``: a heading above the table where there are several, the cells that tell the row, and the column. A sentence's
number is named by the words before it, in JSON by its keys, in a run's ``metrics.jsonl`` by step and key.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NUMBER = re.compile(r"(?<![\w.])[-+]?\d[\d,]*(?:\.\d+)?(?:[eE][-+]?\d+)?")
"""A number as pages and tables write it; a sign belongs to it where nothing stands between them."""

_INTERVALS = ("95 % interval", "quartiles", "quartiles, s")


class FigureError(Exception):
    """A page says what its file does not, or names what is not there."""


@dataclass(frozen=True)
class ResultTable:
    """A table of a result's page.

    Attributes:
        headings: that it stands under, outermost first.
        columns: what its head says.
        rows: cells.
    """

    headings: tuple[str, ...]
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def cells(self, row: Sequence[str], column: str) -> str:
        """One cell, and in brackets behind it the interval that the next column has, where that is one.

        Raises:
            FigureError: there is no such column.
        """
        if column not in self.columns:
            raise FigureError(f"there is no column {column!r}; there are {', '.join(map(repr, self.columns))}")
        place = self.columns.index(column)
        has_interval = place + 1 < len(row) and self.columns[place + 1] in _INTERVALS and row[place + 1]
        return f"{row[place]} ({row[place + 1]})" if has_interval else row[place]


def tables_of(path: Path) -> tuple[ResultTable, ...]:
    """The tables of a Markdown file, in order."""
    found, trail, lines = [], dict[int, str](), path.read_text().splitlines()
    for number, line in enumerate(lines):
        if heading := re.match(r"(#+) (.+)", line):
            depth = len(heading[1])
            trail = {level: text for level, text in trail.items() if level < depth} | {depth: heading[2]}
        if re.fullmatch(r"[|\s:-]*-[|\s:-]*", line) and "|" in line and number:
            rows = []
            for row in lines[number + 1 :]:
                if not row.startswith("|"):
                    break
                rows.append(_cells(row))
            found.append(ResultTable(tuple(trail.values()), _cells(lines[number - 1]), tuple(rows)))
    return tuple(found)


def field_of(path: Path, field: str) -> str:
    """What a result says under a name: the text that begins with its number.

    Args:
        path: a file of a result: ``.md``, ``.json``, or a run's ``.jsonl``.
        field: see the module.

    Raises:
        FigureError: the name leads nowhere, or to several places.
    """
    parts = [part.strip() for part in field.split("|")]
    if path.suffix == ".json":
        return _in_json(json.loads(path.read_text()), parts)
    if path.suffix == ".jsonl":
        lines = {str(line.get("step")): line for line in map(json.loads, path.read_text().splitlines())}
        return _in_json(lines, parts)
    return _after_words(path.read_text(), parts[0]) if len(parts) == 1 else _in_tables(tables_of(path), parts)


def numbers_of(text: str) -> list[str]:
    """The numbers in a text; minutes and seconds are one number of seconds."""
    text = re.sub(r"(\d+) min (\d+) s\b", lambda found: str(60 * int(found[1]) + int(found[2])), text)
    # Of a phrase such as 95 % interval the number says how sure, and is none of the result.
    return [number.rstrip(",") for number in NUMBER.findall(text.replace("95 % interval", ""))]


def agrees(shown: str, measured: str, *, is_share: bool) -> bool:
    """Whether a number on a page is a measured one, rounded to the digits that the page shows.

    Args:
        shown: on the page.
        measured: in the file; it may have more digits, and not less.
        is_share: whether the page writes it in percent, and the file as a share of 1.
    """
    digits, known = (len(number.partition(".")[2]) for number in (shown, measured))
    value = float(measured.replace(",", "")) * (100 if is_share else 1)
    is_known = digits <= known or float(measured.replace(",", "")).is_integer()
    return is_known and abs(float(shown.replace(",", "")) - value) <= 0.5 * 10**-digits * (1 + 1e-9)


def rounded(measured: str, like: str, *, is_share: bool) -> str:
    """A measured number with the digits and the commas that another one has."""
    digits = len(like.partition(".")[2])
    value = float(measured.replace(",", "")) * (100 if is_share else 1)
    sign = "+" if like.startswith("+") else ""
    return f"{value:{sign}{',' if abs(value) >= 1000 else ''}.{digits}f}"


def _cells(line: str) -> tuple[str, ...]:
    return tuple(cell.strip() for cell in line.strip().removeprefix("|").removesuffix("|").split("|"))


def _in_tables(tables: Sequence[ResultTable], parts: Sequence[str]) -> str:
    *keys, column = parts
    found = [text for table in tables if column in table.columns for text in _rows_with(table, keys, column)]
    if len(found) != 1:
        raise FigureError(f"{' | '.join(parts)}: {len(found)} rows of its tables are called that")
    return found[0]


def _rows_with(table: ResultTable, keys: Sequence[str], column: str) -> Iterator[str]:
    for row in table.rows:
        if all(key in row or key in table.headings for key in keys) and any(key in row for key in keys):
            yield table.cells(row, column)


def _in_json(value: Any, parts: Sequence[str]) -> str:
    for part in parts:
        if isinstance(value, list) and part.isdigit():
            value = value[int(part)] if int(part) < len(value) else None
        elif isinstance(value, list):
            named = [entry for entry in value if isinstance(entry, dict) and part in entry.values()]
            value = named[0] if len(named) == 1 else None
        else:
            value = value.get(part) if isinstance(value, dict) else None
        if value is None:
            raise FigureError(f"{' | '.join(parts)}: there is no {part!r}")
    if isinstance(value, dict) and set(value) >= {"value", "low", "high"}:
        return f"{value['value']} ({value['low']} to {value['high']})"
    return str(value)


def _after_words(text: str, words: str) -> str:
    found = re.findall(rf"{re.escape(words)}([^\n]*)", text)
    if len(found) != 1:
        raise FigureError(f"{words!r} stands there {len(found)} times")
    rest: str = found[0]
    return rest
