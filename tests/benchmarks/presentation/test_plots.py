"""Plots: names and ticks are there, and values are as long as they are."""

import re
from xml.etree import ElementTree

import pytest

from benchmarks.presentation.plots import Bar, Panel, Point, bars, line_panels, ratios

_SVG = "{http://www.w3.org/2000/svg}"


def _texts(drawn: ElementTree.Element) -> list[str]:
    return [element.text or "" for element in drawn.iter(f"{_SVG}text")]


def _widths(drawn: ElementTree.Element, colour: str) -> list[float]:
    """From the left end to the right one, of all shapes of a colour."""
    shapes = [path for path in drawn.iter(f"{_SVG}path") if colour in (path.get("style") or "")]
    xs = [[float(x) for x in re.findall(r"[ML] ([\d.]+)", shape.get("d") or "")] for shape in shapes]
    return [max(found) - min(found) for found in xs]


def test_panels_have_their_titles_names_and_ticks() -> None:
    line = [Point(1, 1.0, 0.9, 1.1), Point(4, 0.5, 0.4, 0.6), Point(2, 0.75, 0.7, 0.8)]
    panel = Panel("weak, <zero2>", {"plain & simple": line, "other": line[:1]}, [(1, 1.0), (4, 0.5)])
    empty = Panel("strong, zero3", {}, [])
    svg = line_panels([panel, empty], 2, "ranks", "efficiency")
    texts = _texts(ElementTree.fromstring(svg))
    assert [text for text in texts if text in ("1", "2", "4")] == ["1", "2", "4"]
    for text in ("weak, <zero2>", "plain & simple", "other", "ranks", "efficiency"):
        assert texts.count(text) == 1
    assert "strong, zero3" not in texts
    # The same values give the same file.
    assert svg == line_panels([panel, empty], 2, "ranks", "efficiency")


def test_bars_are_as_long_as_their_values() -> None:
    rows = [Bar("eager", 100.0, 90.0, 110.0), Bar("+ compiled", 200.0, 160.0, 240.0, "MFU 40.0%")]
    drawn = ElementTree.fromstring(bars(rows, "tokens/s"))
    first, second = _widths(drawn, "fill: #56b4e9")
    assert second == pytest.approx(2 * first, abs=0.2)
    first, second = _widths(drawn, "stroke: #000000; stroke-width: 1.3")
    assert second == pytest.approx(4 * first, abs=0.2)
    assert "200 (MFU 40.0%)" in _texts(drawn)


def test_groups_of_ratios_have_their_names_once_each_and_a_line_at_one() -> None:
    groups = {
        "ZeRO-1": [Bar("ours", 0.9, 0.85, 0.95), Bar("theirs", 1.2, 1.1, 1.3)],
        "ZeRO-2": [Bar("ours", 1, 0.9, 1.1)],
    }
    drawn = ratios(groups, "median step")
    texts = _texts(ElementTree.fromstring(drawn))
    for text, times in (
        ("ZeRO-1", 1),
        ("ZeRO-2", 1),
        ("ours", 2),
        ("theirs", 1),
        ("0.900", 1),
        ("1.200", 1),
        ("median step", 1),
    ):
        assert texts.count(text) == times, text
    assert "stroke-dasharray" in drawn
    assert ratios(groups, "median step") == drawn
    # Nothing was measured.
    assert ElementTree.fromstring(ratios({}, "median step")) is not None


def test_contestants_have_their_names() -> None:
    drawn = ratios({"zero1": [Bar("shardline bucketed", 0.9, 0.85, 0.95)]}, "median step")
    assert "Shardline, parallel.backend: bucketed" in _texts(ElementTree.fromstring(drawn))
