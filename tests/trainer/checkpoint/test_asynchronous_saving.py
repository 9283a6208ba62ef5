"""Checkpoints that are written while training goes on: of the state at the save, whole or not there at all."""

import errno
import os
import re
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from sharding.engine import Engine
from sharding.ranks.errors import RunFailure, UserError
from sharding.ranks.process_group import Ranks
from tests.sharding.engine_cases import random_batch, tiny_engine
from tests.support import (
    TINY_MODEL,
    read_metrics,
    run_on_ranks,
    tiny_values,
    wait_until,
    write_corpus,
    write_empty_checkpoint,
)
from trainer.attempt import begin_attempt
from trainer.build import build_trainer
from trainer.checkpoint import writer
from trainer.checkpoint.checkpointer import Checkpointer
from trainer.checkpoint.reader import CheckpointReader
from trainer.checkpoint.safetensors_file import write_tensors
from trainer.checkpoint.training_state import TrainingState
from trainer.config import parse_config
from trainer.config.rules import World
from trainer.data.prepare_stages import prepare_run
from trainer.run_folder.folder import RunFolder
from trainer.runtime.phases import Phases
from trainer.trackers.console import Console
from trainer.trackers.observers import Observers

_ALONE = Ranks(rank=0, world_size=1, local_rank=0, local_world_size=1, device=torch.device("cpu"))


class _Training:
    """A tiny engine on one rank, and what saves it into a folder."""

    def __init__(
        self,
        root: Path,
        before_write: Callable[[int], None],
        *,
        asynchronous: bool = True,
        before_commit: Callable[[], None] = lambda: None,
    ) -> None:
        self.engine: Engine = tiny_engine(_ALONE, "none")
        self.folder = RunFolder(root)
        checkpoint = {"asynchronous": asynchronous, "every_steps": 1, "keep_last": 0}
        values = {"steps": 9, "model": TINY_MODEL, "parallel": {"strategy": "none"}, "checkpoint": checkpoint}
        config = parse_config(values, "test")
        self.checkpointer = Checkpointer(
            config,
            self.folder,
            lambda _: "data",
            _ALONE,
            before_commit,
            notify=lambda *_: None,
            before_write=before_write,
        )
        self.step = 0

    def train(self) -> None:
        self.engine.train_batch([random_batch(self.step)], 20)
        self.engine.clip_grad_norm(1.0)
        self.engine.step(1e-2)
        self.step += 1

    def state(self) -> TrainingState:
        counters = dict.fromkeys(("num_samples", "num_tokens", "num_skipped_steps", "num_skipped_in_a_row"), 0)
        return TrainingState(step=self.step, schedule_total_steps=9, seed=1, **counters)

    def start_saving(self) -> None:
        self.checkpointer.start_saving(self.engine, self.state())

    def saved_steps(self) -> list[int]:
        return sorted(int(m.parent.name[5:]) for m in self.folder.checkpoints_dir.glob("step-*/manifest.json"))


def test_what_is_written_is_the_state_at_the_save(tmp_path: Path) -> None:
    held = threading.Event()
    late = _Training(tmp_path / "late", lambda _: wait_until(held.is_set, what="release"))
    in_place = _Training(tmp_path / "in_place", lambda _: None, asynchronous=False)
    for training in (late, in_place):
        # The first step makes the optimizer's state, so that there is something to go on from.
        training.train()
        training.train()
        training.start_saving()
        training.train()
        training.train()
    assert in_place.saved_steps() == [2]
    assert late.saved_steps() == []
    assert not late.checkpointer.has_written
    held.set()
    wait_until(lambda: late.checkpointer.has_written, what="a write")
    # It is valid when all ranks have agreed, and not before.
    assert late.saved_steps() == []
    late.checkpointer.finish()
    assert late.saved_steps() == [2]
    folders = [training.folder.checkpoint_path(2) for training in (late, in_place)]
    late_file, file = ((folder / "rank-00000.safetensors").read_bytes() for folder in folders)
    assert late_file == file
    manifests = [CheckpointReader(folder).manifest for folder in folders]
    assert manifests[0].files == manifests[1].files
    assert manifests[0].tensors == manifests[1].tensors
    # The buffer is used again.
    late.start_saving()
    in_place.start_saving()
    late.checkpointer.finish()
    files = [training.folder.checkpoint_path(4) / "rank-00000.safetensors" for training in (late, in_place)]
    assert files[0].read_bytes() == files[1].read_bytes() != file


@pytest.mark.timing
def test_a_save_waits_for_the_one_before_it(tmp_path: Path) -> None:
    training = _Training(tmp_path, lambda step: time.sleep(0.5 if step == 1 else 0))
    training.train()
    training.start_saving()
    training.train()
    training.start_saving()
    # It had half a second left, so that it was waited for.
    assert training.saved_steps() == [1]
    training.train()
    training.checkpointer.save(training.engine, training.state())
    assert training.saved_steps() == [1, 2, 3]
    for step in (1, 2, 3):
        CheckpointReader(training.folder.checkpoint_path(step)).verify()


@pytest.mark.timing
def test_going_back_waits_for_what_is_being_written(tmp_path: Path) -> None:
    training = _Training(tmp_path, lambda _: time.sleep(0.3))
    training.train()
    training.start_saving()
    before = [part.tensor.clone() for part in training.engine.state(with_optimizer=True)]
    training.train()
    restored = training.checkpointer.roll_back(training.engine, 1)
    assert restored is not None
    assert restored.step == 1
    for part, tensor in zip(training.engine.state(with_optimizer=True), before, strict=True):
        assert torch.equal(part.tensor, tensor), part.name


def test_all_ranks_parts_must_have_space_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1_000))
    folder = tmp_path / "checkpoints" / "step-00000002"
    assert writer._prepare_folder(folder, [600, 400], 2, lambda: None) is None
    error = writer._prepare_folder(folder, [600, 401], 2, lambda: None)
    said = "2 ranks write 1,001 bytes together, up to 600 each, but .*/checkpoints has 1,000 bytes free; if the disk"
    assert isinstance(error, UserError)
    assert re.search(said, str(error)), error
    assert not folder.exists()
    assert "it has 1,001 bytes, but" in str(writer._prepare_folder(folder, [1_001], 2, lambda: None))


def test_whoever_has_lost_the_folder_removes_nothing_of_its_successors(tmp_path: Path) -> None:
    lost: list[str] = []

    def before_commit() -> None:
        if lost:
            raise RunFailure(lost[0])

    def before_write(step: int) -> None:
        if step == 3:
            # While it is written, and then it cannot be.
            lost.append("taken over while it wrote")
            raise OSError(28, "No space left on device")

    training = _Training(tmp_path, before_write, before_commit=before_commit)
    training.train()
    training.start_saving()
    training.checkpointer.finish()
    training.train()
    lost.append("taken over")
    # Also where there is nothing to remove: what comes next moves lines of metrics.
    with pytest.raises(RunFailure, match="taken over"):
        training.checkpointer.roll_back(training.engine, 1)
    successors = write_empty_checkpoint(training.folder.checkpoint_path(2), 2)
    with pytest.raises(RunFailure, match="taken over"):
        training.start_saving()
    with pytest.raises(RunFailure, match="taken over"):
        training.checkpointer.roll_back(training.engine, 1)
    assert (successors / "manifest.json").exists()
    lost.clear()
    training.train()
    training.start_saving()
    with pytest.raises(UserError, match="no space left"):
        training.checkpointer.finish()
    assert training.folder.checkpoint_path(3).exists()


@pytest.mark.parametrize(
    ("number", "kind"), [(errno.ENOSPC, UserError), (errno.EDQUOT, UserError)]
    + [(number, RunFailure) for number in (errno.ESTALE, errno.EIO, errno.ETIMEDOUT)],
)  # fmt: skip
def test_a_storage_that_is_away_is_a_failure_and_a_full_one_bad_input(
    tmp_path: Path, number: int, kind: type[Exception]
) -> None:
    def fail(_: int) -> None:
        raise OSError(number, os.strerror(number))

    training = _Training(tmp_path, fail)
    training.train()
    training.start_saving()
    with pytest.raises(kind, match=r"step 1 could not be saved: rank 0: cannot write .*; run again|free some space"):
        training.checkpointer.finish()


def test_a_write_that_fails_gives_the_checkpoint_up_and_leaves_the_one_before(tmp_path: Path) -> None:
    def fail(step: int) -> None:
        if step == 2:
            raise OSError(28, "No space left on device")

    training = _Training(tmp_path, fail)
    for _ in range(2):
        training.train()
        training.start_saving()
    wait_until(lambda: training.checkpointer.has_written, what="a failure")
    with pytest.raises(UserError, match=r"step 2 could not be saved: rank 0: .*no space left on device"):
        training.checkpointer.finish()
    assert [path.name for path in training.folder.checkpoints_dir.iterdir()] == ["step-00000001"]


def test_so_does_a_manifest_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "write_manifest", fail)
    training = _Training(tmp_path, lambda _: None)
    training.train()
    training.start_saving()
    said = r"step 1 could not be saved: .*No space left on device; if the disk is full, free some space or lower"
    with pytest.raises(UserError, match=said):
        training.checkpointer.finish()
    assert list(training.folder.checkpoints_dir.iterdir()) == []


def test_a_folder_whose_owner_is_not_known_is_left_alone(tmp_path: Path) -> None:
    is_ours = iter([True])

    def fail() -> None:
        if not next(is_ours, False):
            raise OSError(5, "Input/output error")

    training = _Training(tmp_path, lambda _: None, before_commit=fail)
    training.train()
    training.start_saving()
    with pytest.raises(RunFailure, match=r"step 1 could not be saved: .*Input/output error; run again to continue"):
        training.checkpointer.finish()
    assert [path.name for path in training.folder.checkpoints_dir.iterdir()] == ["step-00000001"]


def test_a_file_reads_as_safetensors_do(tmp_path: Path) -> None:
    tensors: dict[str, torch.Tensor] = {
        str(dtype): torch.arange(21).reshape(3, 7).to(dtype)
        for dtype in (torch.bool, torch.uint8, torch.bfloat16, torch.float16, torch.float32, torch.int64)
    }
    tensors |= {"scalar": torch.tensor(3.5), "across": torch.arange(6.0).reshape(2, 3).T, "nothing": torch.empty(0, 4)}
    entry = write_tensors(tmp_path / "file", tensors)
    assert entry.num_bytes == (tmp_path / "file").stat().st_size
    found = load_file(tmp_path / "file")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


@pytest.mark.timing
def test_ranks_agree_on_when_a_checkpoint_is_there(tmp_path: Path) -> None:
    write_corpus(tmp_path / "documents")
    run_on_ranks(_check_two_ranks, 2, tmp_path)


def _check_two_ranks(ranks: Ranks, root: Path) -> None:
    # Rank 1 writes for longer than several steps take, and rank 0 goes on as long.
    slow = _train(ranks, root, "slow", lambda step: time.sleep(1.0 if ranks.rank == 1 and step == 3 else 0))
    in_place = _train(ranks, root, "in_place", lambda _: None, asynchronous=False)
    for step in (3, 12):
        folders = [folder.checkpoint_path(step) for folder in (slow, in_place)]
        for rank in range(2):
            first, second = (folder / f"rank-{rank:05d}.safetensors" for folder in folders)
            assert first.read_bytes() == second.read_bytes(), (step, rank)
        assert CheckpointReader(folders[0]).manifest.files == CheckpointReader(folders[1]).manifest.files
    lines = read_metrics(slow.path)
    assert [line["train/loss"] for line in lines] == [line["train/loss"] for line in read_metrics(in_place.path)]

    def fail(step: int) -> None:
        if ranks.rank == 1 and step == 6:
            raise OSError("the disk is gone")

    with pytest.raises(UserError, match=r"step 6 could not be saved: rank 1: .*the disk is gone"):
        _train(ranks, root, "failing", fail)
    dist.barrier()
    assert [path.name for path in (root / "runs" / "failing" / "checkpoints").iterdir()] == ["step-00000003"]


def _train(
    ranks: Ranks, root: Path, name: str, before_write: Callable[[int], None], *, asynchronous: bool = True
) -> RunFolder:
    checkpoint = {"asynchronous": asynchronous, "every_steps": 3, "keep_last": 0}
    values: dict[str, Any] = tiny_values(root / "runs", root / "cache", root / "documents")
    config = parse_config(values | {"name": name, "steps": 12, "checkpoint": checkpoint}, name)
    folder = RunFolder(config.run_dir)
    observers = Observers(folder.metrics_file)
    if ranks.rank == 0:
        begin_attempt(folder, config, World(ranks.world_size, has_gpu=False), [])
        observers = Observers(folder.metrics_file, Console(12, (root / f"{name}.log").open("a")), attempt=1)
    trainer = build_trainer(
        config,
        ranks,
        prepare_run(config),
        folder,
        observers,
        Phases(),
        is_stop_requested=lambda: False,
        before_commit=lambda: None,
        before_write=before_write,
    )
    trainer.resume_or_init()
    try:
        trainer.fit()
    finally:
        trainer.close()
    dist.barrier()
    return folder
