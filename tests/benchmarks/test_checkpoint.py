"""``shardline bench checkpoint``: what the table makes of rows, and the whole of it at a tiny size."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.checkpoint.__main__ import main
from benchmarks.checkpoint.table import (
    _step_s,
    _verdict,
    blocking_times,
    markdown,
    series,
    step_times_beside_writes,
)
from benchmarks.measure.comparison import changes_since_last
from tests.support import shardline


def _step(wall_s: float, blocking_s: float = 0.0, *, saves: bool = False, beside_write: bool = False) -> dict[str, Any]:
    times = {"wall_s": wall_s, "blocking_s": blocking_s}
    return {"kind": "step", "mode": "asynchronous", "saves": saves, "beside_write": beside_write} | times


_ROWS = [
    # The end of a window whose save was in the warm-up.
    _step(1.0, 0.5),
    _step(2.0, 0.1, saves=True),
    _step(1.5, beside_write=True),
    _step(1.7, beside_write=True),
    # The checkpoint is made valid.
    _step(1.02, 0.02),
    _step(1.2),
    _step(2.0, 0.3, saves=True),
    _step(1.4, beside_write=True),
    _step(1.05, 0.05),
]


def test_times_fall_to_the_save_they_belong_to() -> None:
    assert blocking_times(_ROWS, "asynchronous") == pytest.approx([0.12, 0.35])
    beside, others = step_times_beside_writes(_ROWS)
    assert beside == pytest.approx([1.6, 1.4])
    assert others == pytest.approx([1.1, 1.0])


def test_where_all_steps_are_beside_writes_the_table_says_so() -> None:
    rows = [row | {"beside_write": True} if not row["saves"] else row for row in _ROWS]
    assert _step_s(rows, "asynchronous") == pytest.approx(1.2)
    rows.append({"kind": "writes", "mode": "asynchronous", "num_bytes": 1, "seconds": [1.0]})
    assert "all steps went on beside a write: there are none to compare" in _verdict(rows)[0]


def test_what_the_benchmark_decides_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--output", str(tmp_path), "checkpoint.asynchronous=false"]) == 2
    assert "checkpoint.asynchronous=false: shardline bench checkpoint decides this itself" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.timeout(400)
def test_saving_and_loading_are_measured(tmp_path: Path, shared_corpus: tuple[Path, Path]) -> None:
    corpus, cache = shared_corpus
    finished = shardline(
        *("bench", "checkpoint", "--", "--saves", 2, "--every", 3, "--loads", 1, "--output", tmp_path),
        *("data.source=text", f"data.paths=[{corpus}]", f"data.cache_dir={cache}", "data.vocab_size=301"),
        *("data.sequence_length=32", "model.config.num_hidden_layers=1"),
        timeout_s=380,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    (raw,) = tmp_path.glob("*_2xcpu/checkpoint.jsonl")
    rows = [json.loads(line) for line in raw.read_text().splitlines()]
    for mode in ("asynchronous", "in_place"):
        steps = [row for row in rows if row["kind"] == "step" and row["mode"] == mode]
        assert [row["step"] for row in steps] == list(range(11, 17))
        assert len(blocking_times(rows, mode)) == 2
        assert all(0 < row["blocking_s"] < row["wall_s"] for row in steps if row["saves"])
        assert not any(row["beside_write"] for row in steps) or mode == "asynchronous"
    assert [row["when"] for row in rows if row["kind"] == "memory"] == [
        *("trained", "trained", "built", "loaded", "trained on"),
    ]
    assert len([row for row in rows if row["kind"] == "load"]) == 1
    table = raw.with_suffix(".md").read_text()
    assert table == markdown(rows, raw.name, changes_since_last(raw, series))
    assert "| in place | 2 |" in table
    # The checkpoints are gone with the measurement.
    assert {path.suffix for path in raw.parent.iterdir()} == {".jsonl", ".md", ".svg", ".log"}
