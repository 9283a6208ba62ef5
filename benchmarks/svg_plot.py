"""Plots as SVG, drawn here: a page of Markdown shows them, and nothing has to be installed for them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

# Colours that people who see red and green alike can tell apart (Okabe and Ito, "Color Universal Design", 2008).
_COLOURS = ("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#999999")
_FONT = 'font-family="sans-serif" font-size="11"'
_PANEL_WIDTH, _PANEL_HEIGHT = 250, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 40, 38
_LEGEND_HEIGHT = 18
_BAR_HEIGHT = 22
# Lines of one panel stand this far apart in x, in pixels, so that their intervals can be told apart.
_DODGE = 3.0


@dataclass(frozen=True)
class Point:
    """A measured value.

    Attributes:
        x: place on the logarithmic axis, a number of ranks.
        y: the value.
        low: lower end of its interval.
        high: upper end.
    """

    x: float
    y: float
    low: float
    high: float


@dataclass(frozen=True)
class Panel:
    """One of several plots side by side.

    Attributes:
        title: above it.
        lines: points by name; a name has the same colour in all panels.
        limit: what was possible at most, dashed; points of (x, y).
    """

    title: str
    lines: dict[str, list[Point]]
    limit: list[tuple[float, float]]


@dataclass(frozen=True)
class Bar:
    """A measured value with a name.

    Attributes:
        name: beside it.
        value: its length.
        low: lower end of its interval.
        high: upper end.
        note: after the value.
    """

    name: str
    value: float
    low: float
    high: float
    note: str = ""


def line_panels(panels: Sequence[Panel], num_columns: int, x_label: str, y_label: str) -> str:
    """Panels in rows, with logarithmic x axes, y axes from 0, and one legend.

    Args:
        panels: row by row.
        num_columns: panels in a row.
        x_label: under each.
        y_label: beside each.
    """
    names = list(dict.fromkeys(name for panel in panels for name in panel.lines))
    colours = {name: _COLOURS[index % len(_COLOURS)] for index, name in enumerate(names)}
    highest = max([1.0, *(point.high for panel in panels for line in panel.lines.values() for point in line)])
    num_rows = -(-len(panels) // num_columns)
    width, height = num_columns * _PANEL_WIDTH, num_rows * _PANEL_HEIGHT + _LEGEND_HEIGHT + 10
    parts = []
    for index, panel in enumerate(panels):
        row, column = divmod(index, num_columns)
        place = f'<g transform="translate({column * _PANEL_WIDTH},{row * _PANEL_HEIGHT})">'
        parts += [place, *_panel(panel, colours, highest, x_label, y_label), "</g>"]
    x = float(_LEFT)
    for name in names:
        y = height - _LEGEND_HEIGHT / 2
        parts.append(f'<circle cx="{x:.1f}" cy="{y - 4:.1f}" r="4" fill="{colours[name]}"/>')
        parts.append(_text(x + 8, y, name))
        x += 26 + 6.2 * len(name)
    return _document(max(width, math.ceil(x)), height, parts)


def bars(rows: Sequence[Bar], x_label: str) -> str:
    """Horizontal bars with intervals, from 0.

    Args:
        rows: from top to bottom.
        x_label: what the values are.
    """
    left = 20 + 6.5 * max(len(row.name) for row in rows)
    length = 360.0
    highest = max(row.high for row in rows) or 1.0
    parts = []
    for index, row in enumerate(rows):
        y = 12 + index * _BAR_HEIGHT
        middle = y + (_BAR_HEIGHT - 6) / 2
        x, low, high = (left + length * value / highest for value in (row.value, row.low, row.high))
        parts += [
            _text(left - 8, middle + 4, row.name, "end"),
            f'<rect x="{left:.1f}" y="{y}" width="{x - left:.1f}" height="{_BAR_HEIGHT - 6}" fill="{_COLOURS[6]}"/>',
            _line(low, middle, high, middle, "#333333", 1.5),
            _text(high + 8, middle + 4, f"{row.value:,.0f}{f'  {row.note}' if row.note else ''}"),
        ]
    bottom = 12 + len(rows) * _BAR_HEIGHT
    parts += [_line(left, 6, left, bottom, "#333333", 1.0), _text(left, bottom + 16, x_label)]
    return _document(math.ceil(left + length + 190), bottom + 26, parts)


def _panel(panel: Panel, colours: dict[str, str], highest: float, x_label: str, y_label: str) -> list[str]:
    xs = sorted({point.x for line in panel.lines.values() for point in line})
    if not xs:
        return []
    inner_width, inner_height = _PANEL_WIDTH - _LEFT - _RIGHT, _PANEL_HEIGHT - _TOP - _BOTTOM
    first, span = math.log2(xs[0]), math.log2(xs[-1]) - math.log2(xs[0]) or 1.0

    def place_x(x: float) -> float:
        return _LEFT + 10 + (inner_width - 20) * (math.log2(x) - first) / span

    def place_y(y: float) -> float:
        return _TOP + inner_height * (1 - y / highest)

    middle = _LEFT + inner_width / 2
    parts = [_text(middle, _TOP - 12, panel.title, "middle"), _text(middle, _PANEL_HEIGHT - 8, x_label, "middle")]
    parts.append(_text(_LEFT - 2, _TOP - 12, y_label, "end"))
    for step in range(5):
        value = highest * step / 4
        y = place_y(value)
        parts += [
            _line(_LEFT, y, _LEFT + inner_width, y, "#e0e0e0", 1.0),
            _text(_LEFT - 5, y + 4, f"{value:.2g}", "end"),
        ]
    parts += [_text(place_x(x), _PANEL_HEIGHT - _BOTTOM + 14, f"{x:g}", "middle") for x in xs]
    limit = " ".join(f"{place_x(x):.1f},{place_y(min(y, highest)):.1f}" for x, y in panel.limit)
    parts.append(f'<polyline points="{limit}" fill="none" stroke="#777777" stroke-dasharray="4 3"/>')
    for index, (name, line) in enumerate(panel.lines.items()):
        shift = _DODGE * (index - (len(panel.lines) - 1) / 2)
        places = [(place_x(point.x) + shift, point) for point in sorted(line, key=lambda point: point.x)]
        colour = colours[name]
        joined = " ".join(f"{x:.1f},{place_y(point.y):.1f}" for x, point in places)
        parts.append(f'<polyline points="{joined}" fill="none" stroke="{colour}" stroke-width="1.2"/>')
        for x, point in places:
            parts.append(_line(x, place_y(point.low), x, place_y(point.high), colour, 1.2))
            parts.append(f'<circle cx="{x:.1f}" cy="{place_y(point.y):.1f}" r="2.6" fill="{colour}"/>')
    return parts


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {_FONT}>{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, width: float) -> str:
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {ends} stroke="{colour}" stroke-width="{width}"/>'


def _document(width: int, height: int, parts: Sequence[str]) -> str:
    # A ground of its own: pages may be dark.
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">'
    return "\n".join([head, f'<rect width="{width}" height="{height}" fill="#ffffff"/>', *parts, "</svg>"]) + "\n"
