"""What a plain text in YAML is, and that what is written is read back."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sharding.ranks.errors import UserError
from tests.support import ROOT
from trainer.config.yaml_files import YamlError, dump_yaml, parse_yaml, read_yaml_mapping

_OLD_RUNS = sorted((ROOT / "tests" / "data").rglob("config*.yaml"))
_SPECIAL = ["on", "no", "y", "1e-3", "=", "<<", "~", "0777", "1_0", "2024-01-01", "-.5", "12:30", "0o17", "a: b", "x\n"]
_TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20) | st.sampled_from(_SPECIAL)
_LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | _TEXTS
_VALUES = st.recursive(_LEAVES, lambda inner: st.lists(inner) | st.dictionaries(_TEXTS, inner), max_leaves=8)


# A text in double quotes that was folded before its space had one more when it was read.
@example({"0\x1f\x1f\x7f\U00010000": "00" + 5 * "\x1f" + 4 * "\x7f" + "\u0100\U000100000 0"})
@settings(max_examples=300)
@given(_VALUES)
def test_what_is_written_is_read_back(values: Any) -> None:
    # Their text tells 1 from 1.0 and true, and 0.0 from -0.0.
    assert repr(parse_yaml(dump_yaml(values))) == repr(values)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("on", True),
        ("no", False),
        ("off", False),
        ("y", "y"),
        ("true", True),
        ("~", None),
        ("", None),
        ("1e-3", 1e-3),
        ("1E5", 1e5),
        ("-2.5e+3", -2500.0),
        (".5e1", 5.0),
        ("1.", 1.0),
        ("-.5", "-.5"),
        (".inf", float("inf")),
        ("1_000", 1000),
        ("0x1F", 31),
        ("0777", 511),
        ("0o17", "0o17"),
        ("08", "08"),
        ("12:30", 750),
        ("\u0661", "\u0661"),
        ("'on'", "on"),
        ("[no, 1e-3, a]", [False, 1e-3, "a"]),
    ],
)
def test_plain_texts_are_what_they_were_to_earlier_releases(text: str, value: Any) -> None:
    assert repr(parse_yaml(text)) == repr(value)


def test_numbers_are_written_for_any_reader_of_yaml() -> None:
    assert dump_yaml({"lr": 1e-5, "eps": 1e-08, "on": "no", "name": "Zürich"}) == (
        "lr: 1.0e-05\neps: 1.0e-08\n'on': 'no'\nname: \"Z\\xFCrich\"\n"
    )


def test_old_runs_are_written_as_they_were() -> None:
    assert len(_OLD_RUNS) > 5
    for path in _OLD_RUNS:
        values = parse_yaml(path.read_text())
        assert parse_yaml(dump_yaml(values)) == values
        assert isinstance(values["optimizer"]["lr"], float)
        assert isinstance(values["optimizer"]["eps"], float)


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ("a: 1\nb: 2\na: 3\n", 3, "the key 'a' is given twice"),
        ("x: &x {a: 1}\ny:\n  <<: *x\n  b: 1\n  b: 2\n", 5, "the key 'b' is given twice"),
        ("x: &x {a: 1}\ny: {<<: *x, <<: *x}\n", 2, "the key '<<' is given twice"),
        ("a: [1\nb: 2\n", 2, "expected"),
        ("a: &a [*a]\n", None, "contains itself"),
        ("a: !!python/name:os.system x\n", 1, "could not determine a constructor"),
        ("a: *b\n", 1, "undefined alias"),
        ("--- 1\n--- 2\n", 2, "another document"),
    ],
)
def test_what_is_refused_says_where(text: str, line: int | None, reason: str) -> None:
    with pytest.raises(YamlError, match=reason) as refused:
        parse_yaml(text)
    assert refused.value.line == line
    assert "\n" not in str(refused.value)


def test_what_is_merged_gives_way_to_what_is_given() -> None:
    assert parse_yaml("x: &x {a: 1, b: 1}\ny: &y {<<: *x, b: 2}\nz: {<<: [*y, *x], c: 3}\n") == {
        "x": {"a": 1, "b": 1},
        "y": {"a": 1, "b": 2},
        "z": {"a": 1, "b": 2, "c": 3},
    }


def test_a_reading_that_failed_leaves_nothing_to_the_next(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("x-a: &a 1\nb: [*a\n")
    with pytest.raises(UserError, match=r"x\.yaml line \d: not valid YAML"):
        read_yaml_mapping(file)
    file.write_text("b: *a\n")
    with pytest.raises(UserError, match="undefined alias"):
        read_yaml_mapping(file)
    file.write_text("x-a: &a 1\nb: *a\n")
    assert read_yaml_mapping(file) == {"b": 1}
