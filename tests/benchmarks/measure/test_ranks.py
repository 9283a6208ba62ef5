"""Ranks of a benchmark, from their start to their end."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks.measure.ranks import run_ranks


@dataclass
class _Assignment:
    threads: int = 1


def test_a_rank_that_is_killed_ends_the_others_and_is_told_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "benchmark.log"
    assert run_ranks("tests.benchmarks.killed_rank", _Assignment(), 2, log) == 1
    assert log.read_text() == "error: a rank was killed by SIGKILL\n"
    assert "killed by SIGKILL" in capsys.readouterr().err
