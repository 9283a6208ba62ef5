"""Which checkpoints a run keeps."""

from sharding.errors import UserError
from trainer.checkpoint.config import CheckpointConfig
from trainer.checkpoint.manifest import read_manifest
from trainer.checkpoint.storage import CheckpointPath, list_checkpoints, remove_checkpoint


def prune_checkpoints(checkpoints_dir: CheckpointPath, settings: CheckpointConfig) -> None:
    """Delete all checkpoints but those that the settings keep; the newest one is always among these.

    Kept are the newest ``keep_last``, those at multiples of ``keep_every`` steps, and the ``keep_best`` whose step has
    the lowest held-out loss. A ``keep_last`` of 0 keeps all.
    """
    if settings.keep_last == 0:
        return
    folders = dict(list_checkpoints(checkpoints_dir))
    kept = set(sorted(folders)[-settings.keep_last :])
    if settings.keep_every:
        kept |= {step for step in folders if step % settings.keep_every == 0}
    if settings.keep_best:
        kept |= set(_best_steps(folders)[: settings.keep_best])
    for step in folders.keys() - kept:
        remove_checkpoint(folders[step])


def remove_checkpoints_after(checkpoints_dir: CheckpointPath, step: int) -> None:
    """Delete the checkpoints of later steps."""
    for later, folder in list_checkpoints(checkpoints_dir):
        if later > step:
            remove_checkpoint(folder)


def _best_steps(folders: dict[int, CheckpointPath]) -> list[int]:
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
