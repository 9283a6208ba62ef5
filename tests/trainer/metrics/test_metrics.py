"""Metrics: rates against a known clock, one line a step, nothing that JSON does not have."""

import json
import math
from pathlib import Path

import pytest
import torch

from sharding.ranks.errors import UserError
from sharding.ranks.process_group import Ranks
from trainer.metrics.clock import ThroughputClock
from trainer.metrics.file import MetricsFile
from trainer.metrics.goodput import Category
from trainer.metrics.step import SkippedSteps, StepRecord, summarize_step
from trainer.metrics.system_metrics import SystemMeter, node_number, system_metrics
from trainer.runtime.phases import Phase, Phases

ONE_RANK = Ranks(0, 1, 0, 1, torch.device("cpu"))


def _record(loss_sum: float = 30.0, num_targets: int = 10) -> StepRecord:
    return StepRecord(torch.tensor(loss_sum), num_targets, torch.tensor(2.5), 0.125)


def test_throughput_is_tokens_over_training_time() -> None:
    now = [100.0]
    phases = Phases(lambda: now[0])
    now[0] += 7.0
    clock = ThroughputClock(phases)

    def spend(phase: Phase, seconds: float) -> None:
        phases.enter(phase)
        now[0] += seconds

    for _ in range(4):
        for phase, seconds in ((Phase.DATA, 0.5), (Phase.AGREE, 0.25), (Phase.TRAIN, 0.75), (Phase.COMPARE, 0.25)):
            spend(phase, seconds)
        clock.add_step(num_tokens=500)
        with phases.during(Phase.SAVE):
            now[0] += 0.25
        now[0] += 0.25
    spend(Phase.EVALUATE, 10.0)
    # The present phase counts as far as it has come.
    spend(Phase.SAVE, 1.0)
    meter = SystemMeter(ONE_RANK, {}, enabled=False)
    metrics, _ = summarize_step(_record(), SkippedSteps(torch.device("cpu")), clock, meter, ONE_RANK)
    assert metrics["throughput/tokens_per_s"] == pytest.approx(2000 / 8)
    assert metrics["throughput/tokens_per_s_per_device"] == pytest.approx(2000 / 8)
    assert metrics["throughput/data_wait_fraction"] == pytest.approx(2 / 8)
    assert metrics["throughput/step_time_s"] == pytest.approx(2.0)
    assert metrics["train/loss"] == pytest.approx(3.0)
    assert metrics["train/grad_norm"] == 2.5
    assert metrics["train/learning_rate"] == 0.125
    assert not any(name.startswith("system/") for name in metrics)
    shares = clock.time_shares(2 / 8)
    assert list(shares.values()) == pytest.approx([6 / 20, 2 / 20, 10 / 20, 2 / 20])
    assert clock.spent_s(Category.CHECKPOINT) == pytest.approx(2.0)
    clock.restart()
    assert clock.num_tokens == 0
    assert clock.time_shares(0.0)["time/saving_fraction"] == 0.0


def test_skipped_steps_are_counted_in_all_and_in_a_row() -> None:
    skipped = SkippedSteps(torch.device("cpu"), total=2, in_a_row=1)
    for stepped in (0.0, 0.0, 1.0, 0.0):
        skipped.add(torch.tensor(stepped))
    assert [float(t) for t in (skipped.total, skipped.in_a_row, skipped.longest)] == [5.0, 1.0, 3.0]


def test_lines_beyond_the_restored_step_are_moved_aside(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, last_step=0)
    for step in (1, 2, 3, 4):
        file.write(step, {"train/loss": step / 3})
    file.close()
    with path.open("a") as torn:
        torn.write('{"step": 5, "train/lo')
    file = MetricsFile(path, last_step=2)
    file.write(3, {"train/loss": 9.0})
    file.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1, "train/loss": 1 / 3},
        {"step": 2, "train/loss": 2 / 3},
        {"step": 3, "train/loss": 9.0},
    ]
    discarded = (tmp_path / "metrics.discarded.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in discarded[:2]] == [3, 4]
    assert discarded[2] == '{"step": 5, "train/lo'


def test_what_is_not_finite_becomes_null(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl", last_step=0)
    file.write(1, {"train/loss": float("nan"), "train/grad_norm": float("inf"), "train/tokens": 3})
    file.close()
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert line == {"step": 1, "train/loss": None, "train/grad_norm": None, "train/tokens": 3}


def test_nodes_and_gpus_are_measured_by_node() -> None:
    meter = SystemMeter(ONE_RANK, {"GROUP_RANK": "3"}, enabled=True)
    node, cpu, memory, gpu, gpu_memory = meter.measure()
    assert node == 3
    assert 0 <= cpu <= 100
    assert 0 < memory <= 100
    assert math.isnan(gpu)
    assert math.isnan(gpu_memory)
    nan = math.nan
    rows = [[0, 50, 10, 80, 20], [10, 70, 30, nan, nan], [0, nan, nan, 60, 40], [10, nan, nan, nan, nan]]
    assert system_metrics(torch.tensor(rows, dtype=torch.float64)) == {
        "system/node-0/cpu_percent": 50,
        "system/node-0/memory_percent": 10,
        "system/node-0/gpu_percent": 70,
        "system/node-0/gpu_memory_percent": 30,
        "system/node-10/cpu_percent": 70,
        "system/node-10/memory_percent": 30,
    }


def test_a_node_has_the_number_that_its_launcher_gives_it() -> None:
    sixth = Ranks(6, 8, 0, 2, torch.device("cpu"))
    assert node_number(sixth, {}) == 3
    assert node_number(sixth, {"SLURM_NODEID": "1"}) == 1
    assert node_number(sixth, {"SLURM_NODEID": "1", "GROUP_RANK": "2"}) == 2


def test_a_full_disk_is_a_sentence(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl", last_step=0)
    # Whatever is written there meets a full disk.
    file.close()
    with Path("/dev/full").open("ab", buffering=0) as full:
        file._file = full
        with pytest.raises(UserError, match=r"/dev/full cannot be written: No space left on device; free some space"):
            file.write(1, {"train/loss": 2.0})
