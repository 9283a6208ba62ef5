"""What a run starts from, on ranks that do not all see the same."""

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from sharding.ranks.errors import RunFailure, UserError
from sharding.ranks.process_group import Ranks
from tests.sharding.engine_cases import tiny_engine
from tests.support import TINY_MODEL, run_on_ranks, write_empty_checkpoint
from trainer.checkpoint import source
from trainer.checkpoint.checkpointer import Checkpointer
from trainer.checkpoint.reader import CheckpointReader
from trainer.checkpoint.reference import check_source
from trainer.checkpoint.source import Source, open_source
from trainer.config import parse_config
from trainer.config.checkpoint import CheckpointConfig
from trainer.run_folder.folder import RunFolder

pytestmark = pytest.mark.timeout(120)


@pytest.mark.timing
def test_ranks_that_do_not_all_see_a_checkpoint_agree_and_move_nothing(tmp_path: Path) -> None:
    run_on_ranks(_check_two_ranks, 2, tmp_path)


def _check_two_ranks(ranks: Ranks, root: Path) -> None:
    for check in (_one_sees_it_later, _one_never_sees_it, _one_cannot_read, _the_folder_is_lost):
        folder = RunFolder(root / check.__name__)
        if ranks.rank == 0:
            write_empty_checkpoint(folder.checkpoint_path(4), 4)
        check(ranks, folder)
        assert (folder.checkpoint_path(4) / "manifest.json").exists()


def _open(folder: RunFolder, ranks: Ranks, before_change: Callable[[], None] = lambda: None) -> Source | None:
    return open_source(CheckpointConfig(), folder, ranks, before_change, print)


def _one_sees_it_later(ranks: Ranks, folder: RunFolder) -> None:
    """As where a network file system keeps for a while what it knows of a folder."""
    hidden_until = time.monotonic() + 1.0

    def late(path: Path) -> CheckpointReader:
        if ranks.rank == 1 and time.monotonic() < hidden_until:
            raise UserError(f"{path} is not a checkpoint: it has no manifest.json; name another step.")
        return CheckpointReader(path)

    with patch.object(source, "CheckpointReader", late):
        found = _open(folder, ranks)
    assert found is not None
    assert found.reader.manifest.training.step == 4


def _one_never_sees_it(ranks: Ranks, folder: RunFolder) -> None:
    def never(path: Path) -> CheckpointReader:
        if ranks.rank == 1:
            raise UserError(f"{path} is not a checkpoint: it has no manifest.json; name another step.")
        return CheckpointReader(path)

    sees = (
        r"does not see what rank 0 does, which has opened .*step-00000004: .*no manifest.json.* its mount lags behind"
    )
    with (
        patch.object(source, "CheckpointReader", never),
        patch.object(source, "SEEN_WITHIN_S", 0.5),
        pytest.raises(RunFailure, match=sees),
    ):
        _open(folder, ranks)


def _one_cannot_read(ranks: Ranks, folder: RunFolder) -> None:
    """A file system that goes away has corrupted nothing."""
    read_bytes = Path.read_bytes

    def stale(path: Path) -> bytes:
        if ranks.rank == 0:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return read_bytes(path)

    with patch.object(Path, "read_bytes", stale), pytest.raises(RunFailure, match=r"Stale file handle; run again"):
        _open(folder, ranks)


def _the_folder_is_lost(ranks: Ranks, folder: RunFolder) -> None:
    """A corrupt one is not moved by whoever has lost the folder, and no rank is left waiting."""
    if ranks.rank == 0:
        corrupt = write_empty_checkpoint(folder.checkpoint_path(6), 6)
        (corrupt / "manifest.json").write_bytes(b"{")

    def lost() -> None:
        raise RunFailure("the folder was taken over")

    with pytest.raises(RunFailure, match="the folder was taken over"):
        _open(folder, ranks, lost)
    assert (folder.checkpoint_path(6) / "manifest.json").exists()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"steps": 4},
            r"one@4 goes on after step 4, but steps=4 leaves 4 - 4 = 0 steps to train; set steps to more than 4, or "
            r"checkpoint.load=weights",
        ),
        (
            {"tokens": 48, "batch": {"global_size": 4}, "data": {"sequence_length": 4}},
            r"tokens=48 = 3 steps of 16 tokens leaves 3 - 4 = -1 steps to train; set tokens to more than 64, or",
        ),
        ({"steps": 5}, None),
        ({"steps": 3, "load": "weights"}, None),
    ],
)
def test_a_fork_with_nothing_left_to_train_is_refused(
    tmp_path: Path, settings: dict[str, Any], said: str | None
) -> None:
    write_empty_checkpoint(tmp_path / "one" / "checkpoints" / "step-00000004", 4)
    load = settings.pop("load", "all")
    checkpoint = {"from": f"{tmp_path}/one@4", "load": load}
    values = settings | {"output_dir": str(tmp_path), "model": TINY_MODEL, "parallel": {"strategy": "none"}}
    config = parse_config(values | {"checkpoint": checkpoint}, "test")
    ranks = Ranks(rank=0, world_size=1, local_rank=0, local_world_size=1, device=torch.device("cpu"))
    checkpointer = Checkpointer(config, RunFolder.of(config), lambda _: "none", ranks, lambda: None)
    if said is None:
        check_source(config, RunFolder.of(config))
    else:
        with pytest.raises(UserError, match=said):
            check_source(config, RunFolder.of(config))
    # The checkpoint has no tensors: whoever gets so far has not been refused for its step.
    with pytest.raises(UserError, match=said or "of another model or optimizer"):
        checkpointer.resume(tiny_engine(ranks, "none"))
