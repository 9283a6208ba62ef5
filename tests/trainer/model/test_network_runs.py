"""A small network from rows to checkpoints: whole runs, in pieces, and on other ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch

from sharding.ranks.process_group import Ranks
from tests.runs_in_process import RunsInProcess, computed_lines, saved_state
from tests.support import read_metrics, run_on_ranks
from trainer.config import RunConfig, parse_config

_CNN = {"channels": [4, 5], "hidden_sizes": [16], "batch_norm": True, "dropout": 0.2}


def _config(root: Path, name: str, parallel: dict[str, Any], steps: int = 6, **sections: Any) -> RunConfig:
    values = {
        "name": name,
        "steps": steps,
        "seed": 7,
        "output_dir": str(root / "runs"),
        "task": {"name": "image-classification"},
        "model": {"builtin": "cnn", "arguments": _CNN},
        "data": {"source": "digits", "cache_dir": str(root / "cache")},
        "batch": {"global_size": 24, "micro_size": 4},
        "optimizer": {"lr": 1e-2, "ema_decay": 0.5},
        "schedule": {"name": "constant"},
        "parallel": parallel,
        "checkpoint": {"every_steps": 3, "keep_last": 0},
        "evaluation": {"every_steps": 3},
        "metrics": {"every_steps": 1},
        "tracking": {"wandb": {"mode": "disabled"}},
    }
    return parse_config(values | sections, name)


def _train(ranks: Ranks, root: Path) -> None:
    runs = RunsInProcess(ranks, root, root)
    for parallel in ({"strategy": "zero3"}, {"strategy": "zero2", "backend": "deepspeed"}):
        case = "-".join(parallel.values())
        whole = runs.train_as(_config(root, f"whole-{case}", parallel))
        pieces = _config(root, f"pieces-{case}", parallel)
        runs.train_as(pieces, stop_at=4)
        continued = runs.train_as(pieces)
        if ranks.rank:
            continue
        assert computed_lines(continued) == computed_lines(whole), case
        (_, one), (_, other) = saved_state(whole, 6), saved_state(continued, 6)
        assert one.keys() == other.keys(), case
        for name, tensor in one.items():
            assert torch.equal(tensor, other[name]), (case, name)
        statistics = [name for name in one if name.endswith(".running_var")]
        # Of the weights and of their average.
        assert len(statistics) == 6, case
        assert len({str(one[name].tolist()) for name in statistics}) == 6, case
        # How much of a peak it is that a network uses nobody knows.
        line = read_metrics(whole.path)[-1]
        assert line["throughput/mfu"] is line["throughput/mfu_causal"] is None
        assert line["eval/accuracy"] > 0
        said = runs.console(f"whole-{case}")
        assert "cnn: " in said
        assert "MFLOP" not in said


def _go_on_alone(ranks: Ranks, root: Path) -> None:
    """What two ranks have saved, continued by one whose micro-batches are as many rows."""
    runs = RunsInProcess(ranks, root, root)
    config = _config(root, "whole-zero3", {"strategy": "none"}, 7, batch={"global_size": 24, "micro_size": 8})
    runs.train_as(config)
    other = _config(root, "pieces-zero3", {"strategy": "none"}, 7, batch={"global_size": 24, "micro_size": 8})
    runs.train_as(other)
    lines = [computed_lines(runs_folder)[-1] for runs_folder in (runs.train_as(config), runs.train_as(other))]
    assert lines[0] == lines[1]


@pytest.mark.timeout(240)
def test_a_run_in_pieces_is_the_run_in_one(tmp_path: Path) -> None:
    run_on_ranks(_train, 2, tmp_path, timeout_s=150)
    run_on_ranks(_go_on_alone, 1, tmp_path, timeout_s=60)
