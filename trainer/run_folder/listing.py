"""Which checkpoints there are, and how they are named, removed and moved; imports no torch."""

import os
import shutil
from pathlib import Path
from typing import Any

from trainer.files.storage import CheckpointPath, UrlPath, list_folders, remove_file

MANIFEST_NAME = "manifest.json"

CORRUPT_FOLDER = "damaged"
"""Folder beside a run's checkpoints, to which those are moved that were found corrupt."""

_PREFIX = "step-"


def checkpoint_step(folder: CheckpointPath) -> int | None:
    """The step that a checkpoint's folder is named after; None for a folder that is named otherwise."""
    digits = folder.name.removeprefix(_PREFIX)
    return int(digits) if folder.name.startswith(_PREFIX) and digits.isdecimal() else None


def checkpoint_folder(checkpoints: CheckpointPath, step: int) -> CheckpointPath:
    """The folder of the checkpoint after a step."""
    return checkpoints / f"{_PREFIX}{step:08d}"


def list_checkpoints(checkpoints: CheckpointPath) -> list[tuple[int, CheckpointPath]]:
    """Steps and folders of the checkpoints that exist, oldest first: those with a manifest."""
    if isinstance(checkpoints, Path):
        folders: list[Any] = [manifest.parent for manifest in checkpoints.glob(f"{_PREFIX}*/{MANIFEST_NAME}")]
    else:
        folders = [f for f in checkpoints.children() if checkpoint_step(f) is not None and (f / MANIFEST_NAME).exists()]
    found = [(step, folder) for folder in folders if (step := checkpoint_step(folder)) is not None]
    return sorted(found, key=lambda entry: entry[0])


def list_step_folders(checkpoints: CheckpointPath) -> list[tuple[int, CheckpointPath]]:
    """Steps and folders, also of checkpoints that are not written yet, or are deleted in part."""
    return [(step, folder) for folder in list_folders(checkpoints) if (step := checkpoint_step(folder)) is not None]


def remove_checkpoint(folder: CheckpointPath) -> None:
    """Delete a checkpoint, manifest first, so that it is never half there."""
    remove_file(folder / MANIFEST_NAME)
    if isinstance(folder, Path):
        shutil.rmtree(folder, ignore_errors=True)
    else:
        folder.remove()


def move_checkpoint(folder: CheckpointPath, target: CheckpointPath) -> None:
    """Rename a checkpoint's folder; in an object store its files are copied and then deleted."""
    if isinstance(folder, Path):
        os.rename(folder, str(target))
    else:
        assert isinstance(target, UrlPath)
        folder.copy_files(target)
        remove_checkpoint(folder)
