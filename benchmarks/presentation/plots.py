"""Plots of results as SVG, which a page of Markdown shows, dark or light; drawn by matplotlib."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from benchmarks.presentation.contestant_names import without_markup

# Colours that people who see red and green alike can tell apart (Okabe and Ito, "Color Universal Design", 2008).
_COLOURS = ("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#999999")
# The same values give the same file, and text stays text.
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "shardline",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
_PANEL_INCHES = (3.0, 2.3)
_LEAST_INCHES = 5.0
_NAME_INCHES = 1.6
_BAR_INCHES = 0.3
# Lines of one panel stand this far apart, as a factor of x, so that their intervals can be told apart.
_DODGE = 1.02


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
    """Panels in rows, with logarithmic x axes, common y axes from 0, and one legend.

    Args:
        panels: row by row; none gives an empty plot.
        num_columns: panels in a row.
        x_label: under each column.
        y_label: beside each row.
    """
    names = list(dict.fromkeys(name for panel in panels for name in panel.lines))
    colours = {name: _COLOURS[index % len(_COLOURS)] for index, name in enumerate(names)}
    highest = max([1.0, *(point.high for panel in panels for line in panel.lines.values() for point in line)])
    num_rows = max(1, -(-len(panels) // num_columns))
    with rc_context(_STYLE):
        width = max(_LEAST_INCHES, _PANEL_INCHES[0] * num_columns)
        figure = Figure(figsize=(width, _PANEL_INCHES[1] * num_rows + 0.3), layout="constrained")
        grid = figure.subplots(num_rows, num_columns, squeeze=False)
        for index, axes in enumerate(grid.flat):
            if index >= len(panels) or not any(panels[index].lines.values()):
                axes.set_visible(False)
                continue
            _draw_panel(axes, panels[index], colours)
            axes.set_ylim(0, 1.05 * highest)
            axes.set_xlabel(x_label)
            axes.set_ylabel(y_label if index % num_columns == 0 else "")
        handles = {
            name: line for axes in grid.flat for line, name in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        if names:
            figure.legend(
                handles.values(), handles, loc="outside lower left", ncols=int(width / _NAME_INCHES), frameon=False
            )
        return _svg(figure)


def bars(rows: Sequence[Bar], x_label: str, num_digits: int = 0) -> str:
    """Horizontal bars with intervals, from 0.

    Args:
        rows: from top to bottom; none says that nothing was measured.
        x_label: what the values are.
        num_digits: of values, after the point.
    """
    rows = rows or [Bar("nothing was measured", 0.0, 0.0, 0.0)]
    with rc_context(_STYLE):
        figure, axes = _rows(rows, x_label, num_digits)
        axes.barh(range(len(rows)), [row.value for row in rows], 0.7, color=_COLOURS[6])
        axes.set_xlim(0, 1.3 * max(row.high for row in rows) or 1.0)
        return _svg(figure)


def ratios(groups: Mapping[str, Sequence[Bar]], x_label: str) -> str:
    """Bars with intervals in groups, beside a line at 1, and one colour for each name.

    Args:
        groups: bars by what stands above them, both from top to bottom.
        x_label: what the values are.
    """
    names = list(dict.fromkeys(bar.name for bars in groups.values() for bar in bars))
    colours = {name: _COLOURS[1 + index % (len(_COLOURS) - 1)] for index, name in enumerate(names)}
    num_rows = sum(1 + len(bars) for bars in groups.values())
    with rc_context(_STYLE):
        figure = Figure(figsize=(7.5, 0.7 + _BAR_INCHES * num_rows), layout="constrained")
        axes = figure.subplots()
        ticks, place = [], 0
        for title, bars in groups.items():
            ticks.append((place, title, True))
            for bar in bars:
                place += 1
                ticks.append((place, without_markup(bar.name), False))
                axes.barh(place, bar.value, 0.7, color=colours[bar.name], alpha=0.85)
                axes.plot([bar.low, bar.high], [place, place], color=_COLOURS[0], linewidth=1.3)
                # The line at 1 may pass behind it.
                ground = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
                text = f"{bar.value:.3f}"
                axes.annotate(text, (bar.high, place), (6, 0), textcoords="offset points", va="center", bbox=ground)
            place += 1
        axes.axvline(1.0, color="#444444", linestyle="--", linewidth=1)
        axes.set_yticks([at for at, _, _ in ticks], [text for _, text, _ in ticks])
        for label, (_, _, is_title) in zip(axes.get_yticklabels(), ticks, strict=True):
            label.set_fontweight("bold" if is_title else "normal")
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(max(num_rows, 1) - 0.5, -0.5)
        axes.set_xlim(0, 1.15 * max([1.0, *(bar.high for bars in groups.values() for bar in bars)]))
        axes.set_xlabel(x_label)
        return _svg(figure)


def _rows(rows: Sequence[Bar], x_label: str, num_digits: int) -> tuple[Figure, Any]:
    """Names, intervals and values, from top to bottom."""
    figure = Figure(figsize=(7.5, 0.7 + _BAR_INCHES * len(rows)), layout="constrained")
    axes = figure.subplots()
    for index, row in enumerate(rows):
        axes.plot([row.low, row.high], [index, index], color=_COLOURS[0], linewidth=1.3)
        text = f"{row.value:,.{num_digits}f}{f' ({row.note})' if row.note else ''}"
        axes.annotate(text, (row.high, index), (6, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(rows)), [without_markup(row.name) for row in rows])
    axes.set_ylim(max(len(rows), 1) - 0.5, -0.5)
    axes.set_xlabel(x_label)
    return figure, axes


def _draw_panel(axes: Any, panel: Panel, colours: dict[str, str]) -> None:
    xs = sorted({point.x for line in panel.lines.values() for point in line})
    axes.set_title(panel.title, fontsize="medium")
    axes.set_xscale("log", base=2)
    axes.set_xticks(xs, [f"{x:g}" for x in xs])
    axes.minorticks_off()
    axes.grid(axis="y", color="#e0e0e0")
    axes.plot(
        *zip(*panel.limit, strict=True) if panel.limit else ([], []), color="#777777", linestyle="--", linewidth=1
    )
    for index, (name, line) in enumerate(panel.lines.items()):
        shift = _DODGE ** (index - (len(panel.lines) - 1) / 2)
        points = sorted(line, key=lambda point: point.x)
        axes.errorbar(
            [point.x * shift for point in points],
            [point.y for point in points],
            [[point.y - point.low for point in points], [point.high - point.y for point in points]],
            color=colours[name],
            marker="o",
            markersize=3,
            linewidth=1.2,
            label=without_markup(name),
        )


def _svg(figure: Any) -> str:
    written = io.StringIO()
    # A ground of its own: pages may be dark.
    figure.savefig(written, format="svg", facecolor="white", metadata={"Date": None})
    return written.getvalue()
