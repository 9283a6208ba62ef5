"""The same claims on GPUs, over NCCL, where there are some."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support import read_metrics, shardline, trained

_GPUS = os.environ["SHARDLINE_TESTS_GPUS"]


def _gpu_variables() -> dict[str, str]:
    """What undoes the hiding of GPUs from the tests."""
    if _GPUS != "all":
        return {"CUDA_VISIBLE_DEVICES": _GPUS}
    num_gpus = len(list(Path("/dev").glob("nvidia[0-9]*")))
    return {"CUDA_VISIBLE_DEVICES": ",".join(map(str, range(num_gpus)))}


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not _gpu_variables()["CUDA_VISIBLE_DEVICES"], reason="needs a GPU"),
]


def test_every_strategy_trains_as_one_plain_process(config_file: Path) -> None:
    finished = shardline("parity", config_file, timeout_s=500, **_gpu_variables())
    assert finished.returncode == 0, finished.stdout + finished.stderr


@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3"])
def test_bf16_learns_and_continues(make_config: Callable[..., Path], strategy: str) -> None:
    sections: dict[str, Any] = {"precision": {"compute": "bf16"}, "parallel": {"strategy": strategy}}
    config = make_config(strategy, steps=24, checkpoint={"every_steps": 6}, **sections)
    for steps in (12, 24):
        trained(shardline("run", config, f"steps={steps}", timeout_s=300, **_gpu_variables()))
    losses = [line["train/loss"] for line in read_metrics(config.parent / "runs" / strategy)]
    assert len(losses) == 24
    assert losses[-1] < losses[0] - 0.3


def test_a_deterministic_run_repeats_bit_for_bit(make_config: Callable[..., Path]) -> None:
    curves = []
    for name in ("once", "again"):
        config = make_config(name, deterministic=True, precision={"compute": "bf16"})
        trained(shardline("run", config, timeout_s=300, **_gpu_variables()))
        curves.append([line["train/loss"] for line in read_metrics(config.parent / "runs" / name)])
    assert curves[0] == curves[1]
