"""Which checkpoints are kept."""

import io
import os
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from tests.support import write_empty_checkpoint
from trainer.checkpoint.__main__ import show_checkpoints
from trainer.checkpoint.config import CheckpointConfig
from trainer.checkpoint.retention import prune_checkpoints
from trainer.checkpoint.storage import remove_checkpoint
from trainer.run_folder import RunFolder

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
    prune_checkpoints(tmp_path, CheckpointConfig(**settings))
    assert sorted(int(path.name[5:]) for path in tmp_path.iterdir()) == kept


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
    text = io.StringIO()
    show_checkpoints(RunFolder(tmp_path).checkpoints_dir, Console(file=text, width=200))
    rows = [line.split() for line in text.getvalue().splitlines() if "step-" in line]
    assert ["3.2500" in row for row in rows] == [False, True]
