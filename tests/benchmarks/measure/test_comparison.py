"""Two results of one kind: what has changed, and what is noise."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from benchmarks.measure.comparison import (
    Change,
    Series,
    changes_markdown,
    compare,
    difference_of_setup,
    ratio_of_independent,
)
from benchmarks.presentation.result_files import last_result, read_rows
from benchmarks.presentation.terminal import show
from trainer.metrics.paired_times import Ratio


def test_a_change_is_told_from_noise_about_as_often_as_the_interval_says() -> None:
    generator = np.random.default_rng(0)
    num_false = num_found = 0
    for seed in range(30):
        before, same, slower = (list(generator.lognormal(sigma=0.05, size=60)) for _ in range(3))
        slower = [1.05 * value for value in slower]
        ratio = ratio_of_independent(Series(same), Series(before), seed)
        num_false += not ratio.low <= 1.0 <= ratio.high
        num_found += ratio_of_independent(Series(slower), Series(before), seed).low > 1.0
    # 1.5 of 30 expected; the binomial distribution leaves 6 in all but one case of a thousand.
    assert num_false <= 6
    # 5 % are 3.1 standard errors of the ratio of two medians of 60: 1.2533 x 0.05 x sqrt(2 / 60).
    assert num_found >= 20


def test_values_that_come_in_runs_widen_the_interval() -> None:
    """A machine that is busy for ten values at a time has told less than its number of values says."""
    generator = np.random.default_rng(1)
    runs = np.repeat(generator.lognormal(sigma=0.2, size=30), 10)
    apart = generator.permutation(runs)
    base = Series(list(np.ones(300)))
    in_runs, shuffled = (ratio_of_independent(Series(list(values)), base) for values in (runs, apart))
    assert in_runs.high - in_runs.low > 1.5 * (shuffled.high - shuffled.low)


def test_a_reference_takes_out_what_slowed_both() -> None:
    generator = np.random.default_rng(2)
    load = generator.lognormal(sigma=0.3, size=100)
    before = Series(list(1.1 * load), list(load))
    busier = Series(list(1.1 * 2 * load), list(2 * load))
    (same,) = compare({"zero1": busier}, {"zero1": before})
    assert (same.before, same.now, same.ratio.value) == pytest.approx((1.1, 1.1, 1.0))
    assert not same.is_more_than_noise
    (absolute,) = compare({"zero1": Series(busier.values)}, {"zero1": Series(before.values)})
    assert absolute.is_more_than_noise
    assert absolute.ratio.value == pytest.approx(2.0)


def test_rows_of_one_result_alone_are_left_out() -> None:
    now = {"a": Series([1.0, 1.0]), "b": Series([2.0, 2.0]), "once": Series([1.0, 1.0]), "never": Series([])}
    before = {"b": Series([4.0, 4.0]), "c": Series([1.0, 1.0]), "once": Series([2.0]), "never": Series([])}
    both = compare(now, before)
    assert [(change.name, change.ratio.value) for change in both] == [("b", 0.5)]


def test_the_last_file_of_the_kind_is_found(tmp_path: Path) -> None:
    def write(folder: str, name: str, time: str, **setup: Any) -> Path:
        path = tmp_path / folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        command = ["shardline", "bench", path.stem.partition("_")[0].partition("-")[0], "--pairs", "300"]
        path.write_text(
            json.dumps({"time": time, "command": command, "setup": setup}) + "\n" + json.dumps({"kind": "end"}) + "\n"
        )
        return path

    folders = [tmp_path / "out", tmp_path / "kept"]
    mine = write("out", "2026-01-05_4xcpu/scaling.jsonl", "2026-01-05T12:00:00+0000")
    assert last_result(mine, folders) is None
    write("out", "2026-01-04_2xcpu/scaling.jsonl", "2026-01-04T12:00:00+0000")
    write("out", "2026-01-04_4xcpu/overhead.jsonl", "2026-01-04T12:00:00+0000")
    assert last_result(mine, folders) is None
    # Another size, and another configuration.
    write("out", "2026-01-04_4xcpu/scaling.jsonl", "2026-01-04T13:00:00+0000", size="tiny")
    write("out", "2026-01-04_4xcpu/scaling-2.jsonl", "2026-01-04T14:00:00+0000", overrides=["batch.micro_size=2"])
    write("out", "2026-01-04_4xcpu/scaling-3.jsonl", "2026-01-04T15:00:00+0000", sequence_length=128)
    # Names of contestants mean another thing.
    write("out", "2026-01-04_4xcpu/scaling-4.jsonl", "2026-01-04T16:00:00+0000", protocol=2)
    assert last_result(mine, folders) is None
    # One that is kept may have a name that says more.
    kept = write("kept", "2026-01-03_4xcpu/scaling_many_pairs.jsonl", "2026-01-03T23:00:00+0000")
    older = write("out", "2026-01-03_4xcpu/scaling.jsonl", "2026-01-03T12:00:00+0000")
    assert last_result(mine, folders) == kept
    kept.unlink()
    # One that came afterwards is not what has changed.
    write("kept", "2026-01-06_4xcpu/scaling.jsonl", "2026-01-06T12:00:00+0000")
    assert last_result(mine, folders) == older


def test_a_result_of_an_earlier_spelling_is_found_and_compared(tmp_path: Path) -> None:
    def write(day: int, *overrides: str) -> Path:
        path = tmp_path / f"2026-01-0{day}_2xcpu" / "memory.jsonl"
        path.parent.mkdir()
        header = {"kind": "header", "time": f"2026-01-0{day}", "hardware": {}, "setup": {"overrides": [*overrides]}}
        path.write_text(json.dumps(header) + "\n")
        return path

    write(1)
    plain = write(2, "parallel.engine=fully_shard")
    buckets = write(3, "steps=3", "parallel.engine=bucketed")
    for raw, before in (
        (write(4, "steps=3", "parallel.backend=bucketed"), buckets),
        (write(5), plain),
        (write(6, "steps=3", "parallel.engine=bucketed"), tmp_path / "2026-01-04_2xcpu" / "memory.jsonl"),
    ):
        assert last_result(raw, [tmp_path]) == before
        assert difference_of_setup(read_rows(raw)[0], read_rows(before)[0]) == ""


def test_changes_are_told_with_their_conditions() -> None:
    now = {"hardware": {"cpu": "A", "usable_cores": 2, "gpus": []}, "packages": {"torch": "2.13"}}
    before = {"hardware": {"cpu": "A", "usable_cores": 4, "gpus": []}, "packages": {"torch": "2.11"}}
    assert difference_of_setup(now, now) == ""
    difference = difference_of_setup(now, before)
    assert difference == "hardware usable_cores 4, now 2; torch 2.11, now 2.13"
    assert difference_of_setup(now | {"setup": {"threads": 1}}, now) == "its setup is not recorded"
    changes = [
        Change("still", 1.0, 1.01, Ratio(1.01, 0.98, 1.04)),
        Change("faster", 1000.0, 1200.0, Ratio(1.2, 1.15, 1.25)),
    ]
    lines = changes_markdown(changes, "old.jsonl", difference)
    assert lines[0].startswith("Since `old.jsonl`: 1 of 2 rows differ by more than noise")
    assert lines[0].endswith(f"Measured under other conditions: {difference}.")
    assert lines[4:] == ["| faster | 1,000 | 1,200 | 1.200 | 1.150 to 1.250 |"]
    assert len(changes_markdown(changes[:1], "old.jsonl", "")) == 1
    # As of another size alone.
    assert changes_markdown([], "old.jsonl", "") == []


def test_another_machines_result_is_no_last_one(tmp_path: Path) -> None:
    hardware = {"cpu": "EPYC", "usable_cores": 2, "memory_gib": 23.5, "gpus": ["NVIDIA H200, 570.1, 143771 MiB"]}
    others = {
        "cores": hardware | {"usable_cores": 64},
        "cpu": hardware | {"cpu": "Xeon"},
        "memory": hardware | {"memory_gib": 47.1},
        "gpus": hardware | {"gpus": ["NVIDIA A100, 570.1, 81920 MiB"]},
    }

    def write(name: str, time: str, machine: dict[str, Any]) -> Path:
        path = tmp_path / "2026-11-03_1xgpu" / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"kind": "header", "time": time, "hardware": machine}) + "\n")
        return path

    mine = write("data-2", "2026-11-03", hardware | {"memory_gib": 23.4})
    for number, machine in enumerate(others.values()):
        write(f"data_of_another_{number}", "2026-11-02", machine)
    assert last_result(mine, [tmp_path]) is None
    # Another driver is a condition that is told.
    same = write("data", "2026-11-01", hardware | {"gpus": ["NVIDIA H200, 580.2, 143771 MiB"]})
    assert last_result(mine, [tmp_path]) == same


def test_tables_on_a_terminal_and_markdown_elsewhere() -> None:
    markdown = "# Data\n\n| row | tokens/s |\n| --- | --- |\n| a | 12 |\n"
    for is_terminal, expected in ((True, False), (False, True)):
        file = io.StringIO()
        show(markdown, Console(file=file, force_terminal=is_terminal, width=80))
        shown = file.getvalue()
        assert ("| --- |" in shown) is expected
        assert "tokens/s" in shown
        assert "12" in shown
