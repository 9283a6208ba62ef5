"""Which checkpoints a run keeps."""

import shutil
from pathlib import Path

from sharding.errors import UserError
from trainer.checkpoint.config import CheckpointConfig
from trainer.checkpoint.manifest import read_manifest


def prune_checkpoints(checkpoints_dir: Path, settings: CheckpointConfig) -> None:
    """Delete all checkpoints but those that the settings keep; the newest one is always among these.

    Kept are the newest ``keep_last``, those at multiples of ``keep_every`` steps, and the ``keep_best`` whose step has
    the lowest held-out loss. A ``keep_last`` of 0 keeps all.
    """
    if settings.keep_last == 0:
        return
    folders = {_step_of(m.parent): m.parent for m in checkpoints_dir.glob("step-*/manifest.json")}
    kept = set(sorted(folders)[-settings.keep_last :])
    if settings.keep_every:
        kept |= {step for step in folders if step % settings.keep_every == 0}
    if settings.keep_best:
        kept |= set(_best_steps(folders)[: settings.keep_best])
    for step in folders.keys() - kept:
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


def _best_steps(folders: dict[int, Path]) -> list[int]:
    """Steps that were evaluated, by loss, a later one before an earlier one of the same loss."""
    losses = {}
    for step, folder in folders.items():
        try:
            loss = read_manifest(folder).training.eval_loss
        except UserError:
            # A damaged one is no good to keep, and no reason to stop training.
            continue
        if loss is not None:
            losses[step] = loss
    return sorted(losses, key=lambda step: (losses[step], -step))
