"""Which checkpoints a run keeps."""

import shutil
from pathlib import Path

from trainer.checkpoint.config import CheckpointConfig


def prune_checkpoints(checkpoints_dir: Path, settings: CheckpointConfig) -> None:
    """Delete all checkpoints but the newest ``keep_last`` ones and those at multiples of ``keep_every`` steps.

    A ``keep_last`` of 0 keeps all.
    """
    if settings.keep_last == 0:
        return
    folders = {_step_of(m.parent): m.parent for m in checkpoints_dir.glob("step-*/manifest.json")}
    for step in sorted(folders)[: -settings.keep_last]:
        if settings.keep_every == 0 or step % settings.keep_every:
            remove_checkpoint(folders[step])


def remove_checkpoint(folder: Path) -> None:
    """Delete a checkpoint, manifest first, so that it is never half there."""
    (folder / "manifest.json").unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def remove_checkpoints_after(checkpoints_dir: Path, step: int) -> None:
    """Delete the checkpoints of later steps."""
    for manifest in checkpoints_dir.glob("step-*/manifest.json"):
        if _step_of(manifest.parent) > step:
            remove_checkpoint(manifest.parent)


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))
