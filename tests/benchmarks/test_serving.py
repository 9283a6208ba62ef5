"""Servers under load: what a turn counts, and the table of it."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks.presentation.result_files import read_rows
from benchmarks.serving.__main__ import main
from benchmarks.serving.table import markdown, plot
from tests.benchmarks.header import result_header
from tests.trainer.serving.serving_support import digits_folder

HEADER = result_header("serving", setup={"duration_s": 60.0, "slow": 20, "num_rows": 200})


def turn(server: str, num_right: int, **values: Any) -> dict[str, Any]:
    counts = dict.fromkeys(("num_right", "num_wrong", "num_lost", "num_busy", "num_refused"), 0)
    before = {**counts, "num_right": num_right, "p50_s": 0.02, "p99_s": 0.05}
    row = {"kind": "turn", "turn": 0, "server": server, "connections": 50, "wall_s": 60.0, "cpu_s": 60.0}
    row |= {"before": before, "after": {**counts, "num_right": 9}, "slow": counts | {"num_busy": 4}}
    return row | {"exit_code": 0, "end_s": 1.25, "listens_after": False} | values


def test_the_table_says_what_was_lost_and_who_stayed() -> None:
    lost = {**turn("fastapi", 1)["after"], "num_lost": 7}
    rows = [HEADER, turn("fastapi", 60_000, after=lost, exit_code=None), turn("shardline", 120_000)]
    rows.append(turn("litserve", 30_000, listens_after=True))
    table = markdown(rows, "serving.jsonl")
    assert "| 50 | shardline | 2,000 | 20.0 | 50.0 | 0 | 0 | 0 | 0.50 | 9 | 0 | 1.2 | 0 |" in table
    assert "| 50 | fastapi | 1,000 | 20.0 | 50.0 | 0 | 0 | 0 | 1.00 | 9 | 7 | 1.2 | none |" in table
    assert table.index("shardline |") < table.index("litserve |") < table.index("fastapi |")
    assert "something still listened: litserve." in table
    assert "- shardline beside 50: 0 answered right, 0 wrong, 4 told that they were too slow" in table
    assert plot(rows).startswith("<?xml")
    assert "Interrupted before anything can be said" in markdown([HEADER], "serving.jsonl")


@pytest.mark.slow
def test_every_server_is_measured_and_ends(tmp_path: Path) -> None:
    folder = digits_folder(tmp_path / "digits")
    options = ["--connections", "8", "--duration-s", "2", "--slow", "2"]
    assert main(["--folder", str(folder), "--output", str(tmp_path / "out"), *options]) == 0
    (raw,) = (tmp_path / "out").glob("*_1xcpu/serving.jsonl")
    turns = {row["server"]: row for row in read_rows(raw) if row["kind"] == "turn"}
    assert set(turns) == {"shardline", "litserve", "fastapi"}
    for row in turns.values():
        assert row["before"]["num_right"] > 10
        assert row["before"]["num_wrong"] == row["before"]["num_lost"] == 0
    assert turns["shardline"]["after"]["num_lost"] == 0
    assert turns["shardline"]["exit_code"] == 0
