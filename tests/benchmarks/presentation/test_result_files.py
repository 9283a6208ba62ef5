"""Where a result lies, and what it is called."""

import re
from pathlib import Path

import pytest

from benchmarks.device.__main__ import _folder_of_today
from benchmarks.presentation.result_files import append_row, kind_of, name_of, raw_file, read_header, results_in


def test_a_result_lies_in_the_folder_of_its_day_and_machine_and_nobody_else_takes_its_name(tmp_path: Path) -> None:
    first, second = (raw_file(tmp_path, "scaling", 4, has_gpu=False) for _ in range(2))
    other = raw_file(tmp_path, "scaling", 1, has_gpu=True)
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_4xcpu/scaling\.jsonl", name_of(first))
    assert (second.parent, second.name) == (first.parent, "scaling-2.jsonl")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_1xgpu/scaling\.jsonl", name_of(other))
    assert (kind_of(first), kind_of(second), kind_of(other)) == ("scaling 4xcpu", "scaling 4xcpu", "scaling 1xgpu")
    assert read_header(first) == {}
    append_row(first, {"kind": "header", "time": "now"})
    assert read_header(first)["time"] == "now"
    # What lies beside results is none.
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "scaling.jsonl").touch()
    assert results_in(tmp_path) == sorted([first, second, other])


def test_a_rank_that_writes_nothing_makes_no_folder(tmp_path: Path) -> None:
    raw_file(tmp_path / "out", "collectives", 2, has_gpu=False, makes_folder=False)
    assert list(tmp_path.iterdir()) == []


def test_a_device_has_a_folder_for_each_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first = _folder_of_today(has_gpu=True)
    assert re.fullmatch(r"runs/benchmarks/\d{4}-\d\d-\d\d_1xgpu/device", first.as_posix())
    first.mkdir(parents=True)
    assert _folder_of_today(has_gpu=True) == first.with_name("device-2")
