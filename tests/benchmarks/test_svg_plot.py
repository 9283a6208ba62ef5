"""Plots: well-formed, and points are where they belong."""

from xml.etree import ElementTree

import pytest

from benchmarks.svg_plot import Bar, Panel, Point, bars, line_panels

_SVG = "{http://www.w3.org/2000/svg}"


def test_points_of_a_panel_are_where_their_values_are() -> None:
    line = [Point(1, 1.0, 0.9, 1.1), Point(4, 0.5, 0.4, 0.6), Point(2, 0.75, 0.7, 0.8)]
    panel = Panel("weak, <zero2>", {"plain & simple": line}, [(1, 1.0), (4, 0.5)])
    drawn = ElementTree.fromstring(line_panels([panel, panel], 2, "ranks", "efficiency"))
    texts = [element.text for element in drawn.iter(f"{_SVG}text")]
    assert "weak, <zero2>" in texts
    assert "plain & simple" in texts
    group = next(drawn.iter(f"{_SVG}g"))
    xs = [float(circle.get("cx")) for circle in group.iter(f"{_SVG}circle")]
    ys = [float(circle.get("cy")) for circle in group.iter(f"{_SVG}circle")]
    # Ranks are in order, and each doubling is as far as the one before.
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.2)
    assert ys[1] - ys[0] == pytest.approx(ys[2] - ys[1], abs=0.2)
    assert xs[0] < xs[1]
    assert ys[0] < ys[1]


def test_bars_are_as_long_as_their_values() -> None:
    rows = [Bar("eager", 100.0, 90.0, 110.0), Bar("+ compiled", 200.0, 200.0, 200.0, "MFU 40.0%")]
    drawn = ElementTree.fromstring(bars(rows, "tokens/s"))
    _, *widths = [float(element.get("width")) for element in drawn.iter(f"{_SVG}rect")]
    assert widths[1] == pytest.approx(2 * widths[0], abs=0.2)
    assert "200  MFU 40.0%" in [element.text for element in drawn.iter(f"{_SVG}text")]
