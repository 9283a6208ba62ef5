"""One run under every launcher, started by ``shardline run`` and by hand: the same losses, bit for bit.

By hand each launcher and rank is a new Python; elsewhere in these tests they are copies of one (tests.zygote).
"""

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher.topology import _installed_gpus
from sharding.ranks.local_group import free_port
from tests.support import (
    ROOT,
    command_environment,
    processes_of,
    rank_processes,
    read_metrics,
    shardline,
    slow_from,
    start_shardline,
    start_torchrun,
    tiny_values,
    trained,
    training_curve,
    wait_until,
    write_config,
)
from trainer.faults.failure.rank_error import read_rank_errors
from trainer.files.atomic_files import write_atomically

MakeConfig = Callable[..., Path]
pytestmark = pytest.mark.timeout(400)

# Longer than any run here lasts until it is stopped.
STEPS = 100
_LONG: dict[str, Any] = {"steps": 400, "checkpoint": {"every_steps": 10}, "schedule": {"total_steps": 400}}
BARE_COMMANDS = {
    "torchrun": ["torch.distributed.run", "--nproc-per-node=2", "--master-port={port}", "-m"],
    "deepspeed": ["deepspeed.launcher.runner", "--num_gpus=2", "--master_port={port}", "--module"],
    "accelerate": [
        "accelerate.commands.launch",
        "--num_processes=2",
        "--multi_gpu",
        "--main_process_port={port}",
        "-m",
    ],
}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, shared_corpus: tuple[Path, Path]) -> list[tuple[Any, ...]]:
    """Step, loss, gradient norm, learning rate and tokens of each step under ``shardline run`` with torchrun."""
    corpus, cache = shared_corpus
    root = tmp_path_factory.mktemp("reference")
    values = tiny_values(root / "runs", cache, corpus)
    values |= {"steps": STEPS, "schedule": values["schedule"] | {"total_steps": 400}}
    trained(shardline("run", write_config(root / "tiny.yaml", values), "--nproc-per-node", 2))
    return _curve(root / "runs" / "tiny")


def _curve(run_dir: Path) -> list[tuple[Any, ...]]:
    """Evaluation is left out: where a run ends, there is one."""
    return [row[:5] for row in training_curve(run_dir)]


def _wait_for_step(run_dir: Path, step: int) -> None:
    def is_there() -> bool:
        lines = read_metrics(run_dir)
        return bool(lines) and lines[-1]["step"] >= step

    wait_until(is_there, timeout_s=180, what=f"step {step}")


@pytest.mark.parametrize("launcher", BARE_COMMANDS)
def test_a_bare_command_gives_the_same_losses(
    make_config: MakeConfig, reference: list[tuple[Any, ...]], launcher: str
) -> None:
    if launcher == "deepspeed" and _installed_gpus():
        pytest.skip("the deepspeed command shows its ranks the GPUs that the tests hide")
    config = make_config("bare", **_LONG)
    module, *options = BARE_COMMANDS[launcher]
    options = [option.format(port=free_port()) for option in options]
    finished = subprocess.run(
        [sys.executable, "-m", module, *options, "trainer", config, "steps=3"],
        capture_output=True,
        text=True,
        timeout=200,
        cwd=ROOT,
        env=command_environment(),
        check=False,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert _curve(config.parent / "runs" / "bare") == reference[:3]


def test_ranks_of_a_bare_command_that_lose_their_folder_save_and_say_nothing_in_it(make_config: MakeConfig) -> None:
    config = make_config("lost", **_LONG)
    run_dir = config.parent / "runs" / "lost"
    with start_torchrun(config, log=config.parent / "log") as process:
        _wait_for_step(run_dir, 3)
        # As after a minute in which this machine stood still.
        lease = run_dir / "lease.json"
        write_atomically(lease, json.dumps(json.loads(lease.read_text()) | {"token": "of another"}))
        assert process.wait(120) == 1
    assert not (run_dir / "outcome.json").exists()
    assert list((run_dir / "checkpoints").glob("*/manifest.json")) == []
    # Also the rank that has no lease of its own knows, and neither was left waiting for the other.
    errors = read_rank_errors(run_dir / "logs" / "attempt-1")
    assert [(rank, error.type) for rank, error in errors.items()] == [(0, "RunFailure"), (1, "RunFailure")]
    assert all("was taken over" in error.message for error in errors.values())


def test_a_run_moves_between_launchers_through_a_stop_and_a_kill(
    make_config: MakeConfig, tmp_path: Path, reference: list[tuple[Any, ...]]
) -> None:
    config = make_config("moved", **_LONG)
    run_dir = config.parent / "runs" / "moved"

    # So that each is ended long before it has taken all steps.
    slowly = slow_from(15, 1, 2, seconds=0.3)
    options = ("--nproc-per-node", 2, "--launcher")
    process = start_shardline("run", config, *options, "deepspeed", log=tmp_path / "first", **slowly)
    _wait_for_step(run_dir, 3)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 75
    assert processes_of(run_dir) == {}
    stopped_at = read_metrics(run_dir)[-1]["step"]
    shown = (tmp_path / "first").read_text()
    assert f"stopped at step {stopped_at}, saved; run the same command again to continue" in shown.splitlines()
    # The terminal is the run's own; what DeepSpeed says of itself is not on it.
    assert "[INFO]" not in shown
    assert "[WARNING]" not in shown

    process = start_shardline("run", config, *options, "accelerate", log=tmp_path / "second", **slowly)
    _wait_for_step(run_dir, stopped_at + 12)
    assert set(rank_processes(run_dir)) == {0, 1}
    process.kill()
    process.wait()
    wait_until(lambda: not processes_of(run_dir), timeout_s=5, what="the end of agent and ranks")

    trained(shardline("run", config, f"steps={STEPS}", *options, "torchrun"))
    assert _curve(run_dir) == reference
