"""A continued run against the run that was never interrupted."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sharding.ranks.local_group import free_port
from tests.saved_state import stored_state
from tests.support import (
    read_metrics,
    run_module,
    shardline,
    tiny_values,
    trained,
    training_curve,
    write_config,
)
from trainer.checkpoint.reader import CheckpointReader
from trainer.run_folder.events import read_events
from trainer.run_folder.folder import RunFolder

MakeConfig = Callable[..., Path]
_EVERY_STEP = {"every_steps": 3, "keep_last": 0}


def _run(config: Path, *overrides: str, ranks: int = 2) -> None:
    trained(shardline("run", config, *overrides, "--nproc-per-node", ranks))


def _final_state(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, model and optimizer, put together from its slices."""
    return stored_state(RunFolder(run_dir).checkpoint_path(step))


def _cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


def _flip_a_bit(file: Path) -> None:
    contents = bytearray(file.read_bytes())
    contents[-1000] ^= 1
    file.write_bytes(contents)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, shared_corpus: tuple[Path, Path]) -> Path:
    """A run of 12 steps in one go on 2 ranks, with dropout, saved every 3 steps; returns its folder."""
    corpus, cache = shared_corpus
    root = tmp_path_factory.mktemp("straight")
    values = tiny_values(root / "runs", cache, corpus)
    values |= {"name": "straight", "steps": 12, "checkpoint": _EVERY_STEP, "evaluation": {"every_steps": 6}}
    _run(write_config(root / "straight.yaml", values))
    return root / "runs" / "straight"


def test_two_continuations_are_bit_for_bit_the_uninterrupted_run(
    straight: Path, make_config: MakeConfig, shared_corpus: tuple[Path, Path], tmp_path: Path
) -> None:
    documents, cache = tmp_path / "documents", tmp_path / "cache"
    shutil.copytree(shared_corpus[0], documents)
    data = {"paths": str(documents), "cache_dir": str(cache)}
    config = make_config("pieces", checkpoint=_EVERY_STEP, evaluation={"every_steps": 6}, data=data)
    _run(config, "steps=3")
    # What is prepared is all that is needed: its source may be touched, and may go.
    for path in documents.iterdir():
        os.utime(path)
    _run(config, "steps=7")
    documents.rename(tmp_path / "elsewhere")
    _run(config, "steps=12")
    assert len([path for path in (cache / "corpora").iterdir() if path.is_dir()]) == 1
    pieces = config.parent / "runs" / "pieces"
    steps = [line["step"] for line in read_metrics(pieces)]
    assert steps == list(range(1, 13))
    expected, found = training_curve(straight), training_curve(pieces)
    # The pieces end with an evaluation each, which the straight run does not make.
    assert [row[:5] for row in found] == [row[:5] for row in expected]
    assert found[5] == expected[5]
    assert found[11] == expected[11]
    expected_state, state = _final_state(straight, 12), _final_state(pieces, 12)
    assert state.keys() == expected_state.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected_state.items())


@pytest.mark.parametrize(
    ("strategy", "ranks", "extra"),
    [
        ("none", 1, ("launch.threads_per_rank=2",)),
        pytest.param("ddp", 2, (), marks=pytest.mark.slow),
        ("zero1", 3, ("batch.micro_size=2",)),
        pytest.param("zero3", 2, ("batch.micro_size=2",), marks=pytest.mark.slow),
        ("hsdp", 4, ("parallel.replicate=2", "batch.micro_size=1")),
    ],
)
def test_any_ranks_and_any_strategy_continue_with_the_same_samples(
    straight: Path, tmp_path: Path, strategy: str, ranks: int, extra: tuple[str, ...]
) -> None:
    copy = tmp_path / "runs" / "straight"
    shutil.copytree(straight, copy)
    # The two newest are corrupt, one so that its size tells and one by a bit of its contents.
    _cut_short(copy / "checkpoints" / "step-00000012" / "rank-00001.safetensors")
    _flip_a_bit(copy / "checkpoints" / "step-00000009" / "rank-00001.safetensors")
    overrides = (f"output_dir={tmp_path / 'runs'}", f"parallel.strategy={strategy}", *extra)
    _run(straight / "config.yaml", *overrides, ranks=ranks)
    expected, found = training_curve(straight), training_curve(copy)
    assert [row[0] for row in found] == [row[0] for row in expected]
    assert found[:6] == expected[:6]
    for after, before in zip(found[6:], expected[6:], strict=True):
        assert after[1] == pytest.approx(before[1], rel=1e-5)
        assert after[2] == pytest.approx(before[2], rel=1e-4)
        # The learning rate and the tokens counted say that schedule and data position went on.
        assert after[3:5] == before[3:5]
    assert found[11][5] == pytest.approx(expected[11][5], rel=1e-5)
    # What had been trained after the checkpoint and was trained again is kept aside: every step appears once.
    discarded = (copy / "metrics.discarded.jsonl").read_text().splitlines()
    assert len(discarded) == 6
    corrupt = [(event["kind"], event["step"], event["path"]) for event in read_events(copy)]
    aside = copy / "checkpoints" / "damaged"
    assert corrupt == [("checkpoint_damaged", step, str(aside / f"step-{step:08d}")) for step in (12, 9)]
    assert {path.name for path in aside.iterdir()} == {"step-00000009", "step-00000012"}


def test_torchrun_alone_gives_the_losses_of_shardline_run(straight: Path, tmp_path: Path) -> None:
    options = ("--nproc-per-node=2", f"--master-port={free_port()}", "-m", "trainer")
    finished = run_module(
        "torch.distributed.run", *options, straight / "config.yaml", f"output_dir={tmp_path}", "steps=5"
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    found = training_curve(tmp_path / "straight")
    assert [row[:5] for row in found] == [row[:5] for row in training_curve(straight)[:5]]
    assert RunFolder(tmp_path / "straight").read_outcome()["status"] == "finished"  # type: ignore[index]


def test_fork_and_warm_start(straight: Path, make_config: MakeConfig) -> None:
    fork = make_config("fork", checkpoint={"from": f"{straight}@6"})
    _run(fork, "steps=8")
    runs = fork.parent / "runs"
    assert [row[:5] for row in training_curve(runs / "fork")] == [row[:5] for row in training_curve(straight)[6:8]]
    warm = make_config("warm", checkpoint={"from": str(straight), "load": "weights"})
    _run(warm, "steps=2")
    first, last = training_curve(runs / "warm")[0], training_curve(straight)[-1]
    fresh = training_curve(straight)[0]
    assert first[0] == 1
    # The first sample again, but seen by the trained model.
    assert first[1] < fresh[1] - 0.5
    assert first[4] == fresh[4]
    assert last[0] == 12


@pytest.mark.slow
def test_the_budget_may_grow_and_the_schedule_keeps_its_horizon(make_config: MakeConfig) -> None:
    config = make_config("grow", schedule={"name": "linear", "warmup_steps": 0, "total_steps": 0}, steps=2)
    _run(config)
    # 12 sequences of 32 tokens are 384 a step: four steps.
    _run(config, "steps=null", "tokens=1200")
    rates = [line["train/learning_rate"] for line in read_metrics(config.parent / "runs" / "grow")]
    assert rates == pytest.approx([0.0055, 0.001, 0.001, 0.001])


def test_old_checkpoints_are_deleted_and_the_best_and_every_nth_are_kept(make_config: MakeConfig) -> None:
    checkpoint = {"every_steps": 1, "keep_last": 2, "keep_every": 5, "keep_best": 2}
    config = make_config("keep", checkpoint=checkpoint, evaluation={"every_steps": 2}, steps=8)
    _run(config)
    run_dir = config.parent / "runs" / "keep"
    losses = {line["step"]: line["eval/loss"] for line in read_metrics(run_dir) if "eval/loss" in line}
    assert list(losses) == [2, 4, 6, 8]
    best = sorted(losses, key=lambda step: losses[step])[:2]
    folders = sorted((run_dir / "checkpoints").iterdir())
    assert [path.name for path in folders] == [f"step-{step:08d}" for step in sorted({5, 7, 8, *best})]
    # Of a step that was not evaluated there is no loss, and no older one.
    for folder in folders:
        training = CheckpointReader(folder).manifest.training
        assert training.eval_loss == losses.get(training.step)


def test_a_finished_run_is_left_alone(straight: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in straight.rglob("*") if path.is_file()}
    finished = shardline("run", straight / "config.yaml", "--nproc-per-node", 2)
    assert finished.returncode == 0
    assert "complete at step 12; nothing to do" in finished.stdout
    assert {path: path.stat().st_mtime_ns for path in straight.rglob("*") if path.is_file()} == before


@pytest.mark.timeout(400)
def test_a_run_moves_between_backends_and_ranks(make_config: MakeConfig) -> None:
    settings = {"steps": 40, "schedule": {"total_steps": 40}, "batch": {"micro_size": 2}}
    straight = make_config("undisturbed", **settings, parallel={"strategy": "zero3"})
    moving = make_config("moving", **settings)
    _run(straight)
    for steps, backend, strategy, ranks in (
        (10, "torch", "zero3", 2),
        (20, "deepspeed", "zero2", 3),
        (30, "accelerate", "ddp", 1),
        (40, "torch", "zero1", 2),
    ):
        _run(moving, f"steps={steps}", f"parallel.backend={backend}", f"parallel.strategy={strategy}", ranks=ranks)
    runs = moving.parent / "runs"
    expected, found = training_curve(runs / "undisturbed"), training_curve(runs / "moving")
    assert [row[0] for row in found] == list(range(1, 41))
    for after, before in zip(found, expected, strict=True):
        assert after[1] == pytest.approx(before[1], rel=1e-5)
        # Rate and counted tokens: the same samples.
        assert after[3:5] == before[3:5]
