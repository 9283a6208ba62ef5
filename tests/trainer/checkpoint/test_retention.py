"""Which checkpoints are kept."""

import os
import shutil
from pathlib import Path

import pytest

from sharding.ranks.errors import RunFailure
from tests.support import write_empty_checkpoint
from trainer.checkpoint.inventory import take_inventory
from trainer.checkpoint.retention import BackgroundPruning, prune_checkpoints, remove_checkpoints_after
from trainer.config.checkpoint import CheckpointConfig
from trainer.run_folder.folder import RunFolder
from trainer.run_folder.listing import remove_checkpoint

_LOSSES = {1: None, 2: 3.0, 3: None, 4: 2.0, 5: None, 6: 2.0, 7: None, 8: 2.5, 9: None}


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"keep_last": 0}, [1, 2, 3, 4, 5, 6, 7, 8, 9]),
        ({"keep_last": 1}, [9]),
        ({"keep_last": 2, "keep_every": 4}, [4, 8, 9]),
        # Of equals the later one.
        ({"keep_last": 1, "keep_best": 1}, [6, 9]),
        ({"keep_last": 1, "keep_best": 3}, [4, 6, 8, 9]),
        ({"keep_last": 1, "keep_best": 9, "keep_every": 3}, [2, 3, 4, 6, 8, 9]),
    ],
)
def test_kept_are_the_newest_every_nth_and_the_best(tmp_path: Path, settings: dict[str, int], kept: list[int]) -> None:
    for step, loss in _LOSSES.items():
        write_empty_checkpoint(tmp_path / f"step-{step:08d}", step, loss)
    prune_checkpoints(tmp_path, CheckpointConfig(**settings), "loss", lambda: None)
    assert sorted(int(path.name[5:]) for path in tmp_path.iterdir()) == kept


@pytest.mark.parametrize("keep_last", [0, 2])
def test_what_an_interrupted_save_or_deletion_has_left_goes_with_the_next(tmp_path: Path, keep_last: int) -> None:
    for step in (4, 8):
        write_empty_checkpoint(tmp_path / f"step-{step:08d}", step)
    # Of the last, a save that is under way.
    for step in (2, 6, 10):
        (tmp_path / f"step-{step:08d}").mkdir()
        (tmp_path / f"step-{step:08d}" / "rank-00000.safetensors").touch()
    (tmp_path / "damaged").mkdir()

    def lost() -> None:
        raise RunFailure("the folder was taken over")

    # What looks left over may be what another is writing, which has taken the folder over and gone back.
    with pytest.raises(RunFailure):
        prune_checkpoints(tmp_path, CheckpointConfig(keep_last=keep_last), "loss", lost)
    assert (tmp_path / "step-00000002").exists()
    prune_checkpoints(tmp_path, CheckpointConfig(keep_last=keep_last), "loss", lambda: None)
    kept = ["damaged", "step-00000004", "step-00000008", "step-00000010"]
    assert sorted(path.name for path in tmp_path.iterdir()) == kept


def test_what_cannot_be_deleted_is_told(tmp_path: Path) -> None:
    for step in (1, 2):
        write_empty_checkpoint(tmp_path / f"step-{step:08d}", step)
    manifest = tmp_path / "step-00000001" / "manifest.json"
    manifest.unlink()
    # It cannot be unlinked, whoever asks.
    manifest.mkdir()
    told: list[str] = []
    pruning = BackgroundPruning(told.append, lambda: None)
    pruning.start(tmp_path, CheckpointConfig(keep_last=1), "loss")
    pruning.wait()
    assert len(told) == 1
    assert told[0].startswith("older checkpoints were not deleted: ")
    assert str(manifest) in told[0]


def test_whoever_loses_the_folder_while_it_deletes_stops_there(tmp_path: Path) -> None:
    for step in range(1, 6):
        write_empty_checkpoint(tmp_path / f"step-{step:08d}", step)
    asked: list[None] = []

    def before_remove() -> None:
        asked.append(None)
        if len(asked) > 2:
            raise RunFailure("the folder was taken over")

    told: list[str] = []
    pruning = BackgroundPruning(told.append, before_remove)
    pruning.start(tmp_path, CheckpointConfig(keep_last=1), "loss")
    pruning.wait()
    assert len(list(tmp_path.iterdir())) == 3
    assert told == ["older checkpoints were not deleted: the folder was taken over"]
    with pytest.raises(RunFailure):
        remove_checkpoints_after(tmp_path, 0, before_remove)
    assert len(list(tmp_path.iterdir())) == 3


def test_a_checkpoint_that_is_being_deleted_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_empty_checkpoint(tmp_path / "step-00000001", 1)
    (folder / "rank-00000.safetensors").touch()
    there = []
    monkeypatch.setattr(shutil, "rmtree", lambda path, **_: there.append(sorted(os.listdir(path))))
    remove_checkpoint(folder)
    assert there == [["rank-00000.safetensors"]]


def test_the_list_shows_losses(tmp_path: Path) -> None:
    for step, loss in ((1, None), (2, 3.25)):
        write_empty_checkpoint(tmp_path / "checkpoints" / f"step-{step:08d}", step, loss)
    corrupt = tmp_path / "checkpoints" / "step-00000001" / "manifest.json"
    for num_corrupt in (0, 1):
        inventory = take_inventory(RunFolder(tmp_path).checkpoints_dir)
        assert len(inventory.corrupt) == num_corrupt
        rows = [line.split() for line in inventory.text().splitlines() if "step-" in line]
        # A corrupt one is told of below the others.
        assert ["3.2500" in row for row in rows] == ([True, False] if num_corrupt else [False, True])
        corrupt.write_text("{")
    assert rows[1][0] == "step-00000001:"
