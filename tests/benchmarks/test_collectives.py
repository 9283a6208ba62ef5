"""Bandwidth of collectives and links, on two ranks and small messages."""

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks.collectives.__main__ import main, message_sizes
from benchmarks.collectives.table import bus_factor, slowest_s


def test_bus_bandwidth_counts_what_a_link_carries() -> None:
    # Of 4 ranks: an all-reduce sends 3/4 of the message twice, the others once.
    assert bus_factor("all-reduce", 4) == 1.5
    assert bus_factor("all-gather", 4) == bus_factor("reduce-scatter", 4) == 0.75


def test_the_slowest_rank_counts() -> None:
    row = {"kind": "round", "collective": "all-reduce", "num_bytes": 8, "seconds": [1.0, 3.0]}
    assert slowest_s([{"kind": "header"}, row, row | {"seconds": [2.0, 1.0]}]) == {("all-reduce", 8): [3.0, 2.0]}


def test_sizes_grow_by_a_factor_up_to_the_largest() -> None:
    assert message_sizes(4096, 70000, 4) == [4096, 16384, 65536]


@pytest.mark.timeout(120)
def test_two_ranks_are_measured(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    few = ["--min-bytes", "4096", "--max-bytes", "65536", "--factor", "16", "--rounds", "2", "--warmup", "1"]
    assert main([*few, "--nproc", "2", "--output", str(tmp_path)]) == 0, capfd.readouterr()
    (raw,) = tmp_path.glob("*_2x*/collectives.jsonl")
    rows = [json.loads(line) for line in raw.read_text().splitlines()]
    times = slowest_s(rows)
    assert {name for name, _ in times} == {"all-reduce", "reduce-scatter", "all-gather"}
    assert {size for _, size in times} == {4096, 65536}
    assert all(len(values) == 2 and min(values) > 0 for values in times.values())
    ElementTree.fromstring(raw.with_suffix(".svg").read_text())
    assert "over gloo" in raw.with_suffix(".md").read_text()
