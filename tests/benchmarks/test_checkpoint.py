"""``shardline bench checkpoint``: what the table makes of rows, and the whole of it at a tiny size."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.checkpoint.__main__ import main, warmup_steps
from benchmarks.checkpoint.table import (
    _step_s,
    _verdict,
    blocking_times,
    markdown,
    series,
    step_times_beside_writes,
    turn_ratio,
    turn_times,
)
from benchmarks.measure.comparison import changes_since_last
from benchmarks.presentation.result_files import digest_line, name_of
from tests.support import shardline


def _step(step: int, wall_s: float, blocking_s: float = 0.0, **values: Any) -> dict[str, Any]:
    """The row of a step; three are a turn, and each step of a run that does not save takes 1 s."""
    row = {"kind": "step", "mode": "asynchronous", "start": 0, "turn": step // 3, "step": step}
    return row | {"wall_s": wall_s, "blocking_s": blocking_s, "saves": False, "beside_write": False} | values


def _turns(start: int, slowness: float) -> list[dict[str, Any]]:
    saving = [
        _step(0, 2.0, 0.1, saves=True),
        _step(1, 1.5, beside_write=True),
        # The checkpoint is made valid.
        _step(2, 1.02, 0.02),
        _step(3, 2.0, 0.3, saves=True),
        _step(4, 1.4, beside_write=True),
        _step(5, 1.05, 0.05),
    ]
    rows = [*saving, *(_step(step, 1.0, mode="none") for step in range(6))]
    return [row | {"start": start, "wall_s": slowness * row["wall_s"]} for row in rows]


_ROWS = [*_turns(0, 1.0), *_turns(1, 2.0)]


def test_times_fall_to_the_save_they_belong_to() -> None:
    assert blocking_times(_turns(0, 1.0), "asynchronous") == pytest.approx([0.12, 0.35])
    beside, others = step_times_beside_writes(_turns(0, 1.0))
    assert beside == [pytest.approx([1.5, 1.4])]
    assert others == [pytest.approx([1.0, 1.0])]


def test_turns_are_compared_with_those_of_the_run_that_does_not_save_in_the_same_start() -> None:
    assert turn_times(_ROWS, "asynchronous") == [pytest.approx([4.52, 4.45]), pytest.approx([9.04, 8.9])]
    ratio = turn_ratio(_ROWS, "asynchronous")
    assert ratio is not None
    # The second start is on a machine of half the speed, for both.
    assert ratio.by_start == pytest.approx([4.485 / 3] * 2)
    assert turn_ratio(_ROWS, "none") is None
    # An interrupted turn is left out, on both sides.
    found = turn_ratio([row for row in _ROWS if (row["start"], row["step"]) != (1, 5)], "asynchronous")
    assert found is not None
    assert found.by_start == pytest.approx([4.485 / 3, 9.04 / 6])


def test_where_no_write_outlasts_its_step_the_table_says_so() -> None:
    rows = [row | {"beside_write": False} for row in _ROWS]
    assert _step_s(rows[:6], "asynchronous") == pytest.approx(1.2)
    rows.append({"kind": "writes", "mode": "asynchronous", "num_bytes": 1, "seconds": [1.0]})
    assert "No step began beside a write that was still going on" in _verdict(rows)[0]


def test_a_turn_begins_with_a_step_that_saves() -> None:
    assert [warmup_steps(every) for every in (3, 4, 5, 10, 30)] == [11, 11, 14, 19, 29]


def test_what_the_benchmark_decides_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--output", str(tmp_path), "checkpoint.asynchronous=false"]) == 2
    assert "checkpoint.asynchronous=false: shardline bench checkpoint decides this itself" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.timeout(400)
def test_saving_and_loading_are_measured(tmp_path: Path, shared_corpus: tuple[Path, Path]) -> None:
    corpus, cache = shared_corpus
    finished = shardline(
        *("bench", "checkpoint", "--", "--starts", 1, "--saves", 2, "--every", 3, "--loads", 1, "--output", tmp_path),
        *("data.source=text", f"data.paths=[{corpus}]", f"data.cache_dir={cache}", "data.vocab_size=301"),
        *("data.sequence_length=32", "model.config.num_hidden_layers=1"),
        timeout_s=380,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    (raw,) = tmp_path.glob("*_2xcpu/checkpoint.jsonl")
    rows = [json.loads(line) for line in raw.read_text().splitlines()]
    for mode in ("none", "asynchronous", "in_place"):
        steps = [row for row in rows if row["kind"] == "step" and row["mode"] == mode]
        assert [(row["step"], row["turn"]) for row in steps] == [(12, 0), (13, 0), (14, 0), (15, 1), (16, 1), (17, 1)]
        assert [row["step"] for row in steps if row["saves"]] == ([] if mode == "none" else [12, 15])
        assert all(0 < row["blocking_s"] < row["wall_s"] for row in steps if row["saves"])
        assert not any(row["beside_write"] for row in steps) or mode == "asynchronous"
        assert len(blocking_times(rows, mode)) == (0 if mode == "none" else 2)
    assert [row["when"] for row in rows if row["kind"] == "memory"] == ["trained", "built", "loaded", "trained on"]
    assert len([row for row in rows if row["kind"] == "load"]) == 1
    table = raw.with_suffix(".md").read_text()
    assert table == markdown(rows, name_of(raw), changes_since_last(raw, series)) + digest_line(raw)
    assert "| in place | 2 |" in table
    # The checkpoints are gone with the measurement.
    assert {path.suffix for path in raw.parent.iterdir()} == {".jsonl", ".md", ".svg", ".log"}
