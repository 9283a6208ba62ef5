"""Runs with own optimizers: continued, and moved to other ranks."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import shardline, trained, training_curve
from trainer.checkpoint.reader import CheckpointReader

MakeConfig = Callable[..., Path]


@pytest.mark.timeout(500)
@pytest.mark.parametrize(("name", "lr"), [("muon", 1e-2), pytest.param("adafactor", 0.3, marks=pytest.mark.slow)])
def test_a_run_continues_bit_for_bit_and_on_three_ranks(name: str, lr: float, make_config: MakeConfig) -> None:
    groups = [{"pattern": "*.mlp.*", "lr_scale": 0.5}, {"pattern": "*norm*", "weight_decay": 0.1}]
    sections = {
        "optimizer": {"name": name, "lr": lr, "groups": groups},
        "checkpoint": {"every_steps": 2, "keep_last": 0},
    }
    whole = make_config("whole", **sections)
    trained(shardline("run", whole, "steps=4", "--nproc-per-node", 2))
    runs = whole.parent / "runs"
    expected = training_curve(runs / "whole")
    assert expected[-1][1] < expected[0][1]
    parts = make_config("parts", **sections)
    trained(shardline("run", parts, "steps=2", "--nproc-per-node", 2))
    trained(shardline("run", parts, "steps=4", "--nproc-per-node", 2))
    assert [row[:5] for row in training_curve(runs / "parts")] == [row[:5] for row in expected]
    hashes = [
        {file: entry.sha256 for file, entry in CheckpointReader(path).manifest.files.items()}
        for path in (runs / "whole" / "checkpoints" / "step-00000004", runs / "parts" / "checkpoints" / "step-00000004")
    ]
    assert hashes[0] == hashes[1]
    moved = make_config("moved", **sections)
    trained(
        shardline(
            "run",
            moved,
            "steps=4",
            f"checkpoint.from={runs / 'whole'}@2",
            "batch.micro_size=2",
            "parallel.strategy=zero3",
            "--nproc-per-node",
            3,
        )
    )
    found = training_curve(runs / "moved")
    assert [row[0] for row in found] == [3, 4]
    for row, other in zip(found, expected[2:], strict=True):
        assert row[1] == pytest.approx(other[1], rel=1e-5)


def test_a_pattern_without_parameters_ends_the_run_before_it_trains(make_config: MakeConfig) -> None:
    config = make_config("groups", optimizer={"groups": [{"pattern": "*.mlpp.*", "lr_scale": 0.5}]})
    finished = shardline("run", config, "--nproc-per-node", 2)
    assert finished.returncode == 2, finished.stdout + finished.stderr
    assert (
        "optimizer.groups.0.pattern=*.mlpp.* matches no trained parameter; the nearest names are model"
        in finished.stderr
    )
    assert "Traceback" not in finished.stdout + finished.stderr
