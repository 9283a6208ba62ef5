"""All results on one page, and all benchmarks in one command."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import all as all_benchmarks
from benchmarks.all import QUICK
from benchmarks.checkpoint.table import series as checkpoint_series
from benchmarks.data.table import series as data_series
from benchmarks.measure.comparison import changes_since_last
from benchmarks.overhead.table import series as overhead_series
from benchmarks.presentation.report import main, newest_results, render
from benchmarks.startup.__main__ import BARE, SHARDLINE
from benchmarks.startup.__main__ import series as startup_series
from launcher.commands import _BENCHMARKS
from tests.support import ROOT


def write_result(folder: Path, name: str, rows: list[dict[str, Any]], table: str) -> Path:
    raw = folder / f"{name}.jsonl"
    raw.parent.mkdir(exist_ok=True)
    raw.write_text("".join(json.dumps(row) + "\n" for row in rows))
    raw.with_suffix(".md").write_text(table)
    return raw


def startup_rows(time: str, ours_s: float) -> list[dict[str, Any]]:
    header = {"kind": "header", "time": time, "hardware": {"cpu": "one"}, "packages": {"torch": "2.13"}}
    rounds = [{"kind": "round", "wall_s": {SHARDLINE: ours_s + 0.01 * n, BARE: 5.0 + 0.01 * n}} for n in range(9)]
    return [header, {"kind": "warmup", "wall_s": {SHARDLINE: 99.0, BARE: 99.0}}, *rounds]


def test_the_newest_of_each_kind_is_shown_with_its_plot(tmp_path: Path) -> None:
    write_result(tmp_path, "2026-11-01_2xcpu/startup", startup_rows("2026-11-01T12:00:00", 6.0), "# Old\n")
    newest = write_result(
        tmp_path, "2026-11-01_2xcpu/startup-2", startup_rows("2026-11-02T12:00:00", 9.0), "# Start-up\n\n## Part\n"
    )
    scaling = write_result(tmp_path, "2026-11-01_4xcpu/scaling", [{"kind": "header", "time": "t"}], "# Scaling\n")
    scaling.with_suffix(".svg").write_text("<svg/>")
    (tmp_path / "2026-11-01_4xcpu" / "notes.jsonl").write_text("")
    assert newest_results(tmp_path) == [scaling, newest]
    page = render(newest_results(tmp_path))
    assert page.startswith("# Benchmarks\n\n## Scaling\n\n![scaling](2026-11-01_4xcpu/scaling.svg)")
    assert "## Start-up\n\n### Part" in page
    assert "# Old" not in page
    (changed, *_) = changes_since_last(newest, startup_series)
    assert changed.startswith("Since `2026-11-01_2xcpu/startup.jsonl`: 1 of 1 rows differ by more than noise")
    assert main([str(tmp_path)]) == 0
    assert (tmp_path / "report.md").read_text() == page


def test_an_empty_folder_is_an_error_with_a_remedy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert "holds no results; measure something first" in capsys.readouterr().err


def test_a_repeated_result_is_compared_by_what_does_not_depend_on_the_machines_mood() -> None:
    series = startup_series(startup_rows("now", 7.5))
    assert [round(value, 2) for value in series[SHARDLINE].values[:2]] == [7.5, 7.51]
    assert series[SHARDLINE].reference is not None
    rows = [
        {"kind": "header", "size": "tiny", "num_pairs": 1},
        {"kind": "round", "size": "tiny", "wall_s": {"plain": [1.0, 2.0], "shardline": [1.5, 1.0]}},
    ]
    (name, overhead), *others = overhead_series(rows).items()
    assert (name, list(overhead.values), list(overhead.reference or [])) == ("tiny: shardline", [1.5], [2.0])
    assert others == []
    step = {"kind": "step", "mode": "asynchronous", "wall_s": 1.0}
    steps = [step | {"saves": True, "blocking_s": 0.1}, step | {"saves": False, "blocking_s": 0.2}]
    found = checkpoint_series([*steps, {"kind": "load", "mode": "load", "seconds": 3.0}])
    assert {name: [round(v, 3) for v in one.values] for name, one in found.items()} == {
        "blocks, asynchronous": [0.3],
        "load": [3.0],
    }
    rates: list[dict[str, Any]] = [
        {"kind": "loader", "loader": "on demand", "tokens_per_s": [5.0, 6.0]},
        {"kind": "tokenizer", "num_threads": 2, "tokens_per_s": [1.0, 2.0]},
        {"kind": "tokenizer", "num_threads": 1, "tokens_per_s": 1.0},
        {"kind": "first batch", "seconds": 0.5},
        {"kind": "first batch", "seconds": 0.6},
    ]
    assert {name: list(one.values) for name, one in data_series(rates).items()} == {
        "on demand": [5.0, 6.0],
        "tokenizer, 2 threads": [1.0, 2.0],
        "tokenizer, 1 threads": [1.0],
        "first batch": [0.5, 0.6],
    }


def test_every_benchmark_is_part_of_all() -> None:
    assert set(_BENCHMARKS) - set(QUICK) == {"all", "report"}
    assert all((ROOT / "benchmarks" / name / "__main__.py").exists() for name in QUICK)


def test_a_benchmark_that_fails_is_named_and_the_rest_goes_on(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(all_benchmarks, "QUICK", {"startup": ["--rounds", "0"], "report": ["--help"]})
    assert all_benchmarks.main(["--quick", "--only", "startup,report", "--output", str(tmp_path)]) == 1
    captured = capfd.readouterr()
    assert "at least 1 start is needed" in captured.err
    assert "== report, 2 of 2" in captured.out
    assert "error: failed: startup (status 2)" in captured.err
