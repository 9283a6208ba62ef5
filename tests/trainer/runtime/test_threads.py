"""CPU threads of a rank."""

import os
from pathlib import Path

import pytest

from trainer.config import load_config
from trainer.runtime.threads import threads_per_rank

CORES = len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("configured", "environment", "expected"),
    [
        (0, {}, max(1, CORES // 2)),
        (0, {"OMP_NUM_THREADS": "3"}, 3),
        (5, {"OMP_NUM_THREADS": "3"}, 5),
        (0, {"OMP_NUM_THREADS": "many"}, max(1, CORES // 2)),
        # torchrun sets 1 where the user has said nothing; under `shardline run` the value is the user's or the table's.
        (0, {"OMP_NUM_THREADS": "64", "TORCHELASTIC_RUN_ID": "x"}, max(1, CORES // 2)),
        # So does Accelerate, also for a single process.
        (0, {"OMP_NUM_THREADS": "64", "ACCELERATE_DYNAMO_BACKEND": "NO"}, max(1, CORES // 2)),
        (0, {"OMP_NUM_THREADS": "3", "TORCHELASTIC_RUN_ID": "x", "SHARDLINE_ATTEMPT": "1"}, 3),
    ],
)
def test_threads(config_file: Path, configured: int, environment: dict[str, str], expected: int) -> None:
    config = load_config(config_file, [f"launch.threads_per_rank={configured}"])
    assert threads_per_rank(config, 2, environment) == expected


def test_never_none(config_file: Path) -> None:
    assert threads_per_rank(load_config(config_file), 10_000, {}) == 1
