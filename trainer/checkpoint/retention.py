"""Which checkpoints a run keeps."""

import threading
from collections.abc import Callable, Collection

from sharding.ranks.errors import RunFailure, UserError
from trainer.checkpoint.base_manifest import list_bases
from trainer.checkpoint.manifest import read_manifest
from trainer.config.checkpoint import CheckpointConfig
from trainer.files.storage import CheckpointPath
from trainer.run_folder.listing import CORRUPT_FOLDER, list_checkpoints, list_step_folders, remove_checkpoint


class BackgroundPruning:
    """``prune_checkpoints`` in a thread, one at a time: deleting large files takes a file system its time."""

    def __init__(self, warn: Callable[[str], None], before_remove: Callable[[], None]) -> None:
        """Nothing runs yet.

        Args:
            warn: told, in ``wait``, what could not be deleted; the checkpoint is there all the same, and the next save
                deletes what this one could not.
            before_remove: called before each checkpoint that is deleted; raises if the folder was lost.
        """
        self._warn = warn
        self._before_remove = before_remove
        self._thread: threading.Thread | None = None
        self._error: UserError | RunFailure | OSError | None = None

    def start(
        self, checkpoints_dir: CheckpointPath, settings: CheckpointConfig, monitor: str, bases: Collection[str] = ()
    ) -> None:
        """Begin, once the one before is over; see ``prune_checkpoints`` and ``prune_bases``."""
        self.wait()
        self._thread = threading.Thread(
            target=self._run, args=(checkpoints_dir, settings, monitor, bases), name="checkpoint-pruning", daemon=True
        )
        self._thread.start()

    def wait(self) -> None:
        """Wait until it is over."""
        if self._thread is not None:
            self._thread.join()
        self._thread = None
        if self._error is not None:
            self._warn(f"older checkpoints were not deleted: {self._error}")
        self._error = None

    def _run(
        self, checkpoints_dir: CheckpointPath, settings: CheckpointConfig, monitor: str, bases: Collection[str]
    ) -> None:
        try:
            prune_checkpoints(checkpoints_dir, settings, monitor, self._before_remove)
            prune_bases(checkpoints_dir, bases, self._before_remove)
        except (UserError, RunFailure, OSError) as error:
            self._error = error


def prune_checkpoints(
    checkpoints_dir: CheckpointPath, settings: CheckpointConfig, monitor: str, before_remove: Callable[[], None]
) -> None:
    """Delete all checkpoints but those that the settings keep; the newest one is always among these.

    Kept are the newest ``keep_last``, those at multiples of ``keep_every`` steps, and the ``keep_best`` whose step has
    the best value of the metric that is monitored. A ``keep_last`` of 0 keeps all. What an interrupted save or deletion
    has left of steps before the newest goes too.
    """
    folders = dict(list_checkpoints(checkpoints_dir))
    newest = max(folders, default=0)
    for step, folder in list_step_folders(checkpoints_dir):
        # A later one may be under way.
        if step < newest and step not in folders:
            before_remove()
            remove_checkpoint(folder)
    if settings.keep_last == 0:
        return
    kept = set(sorted(folders)[-settings.keep_last :])
    if settings.keep_every:
        kept |= {step for step in folders if step % settings.keep_every == 0}
    if settings.keep_best:
        kept |= set(_best_steps(folders, monitor)[: settings.keep_best])
    for step in folders.keys() - kept:
        before_remove()
        remove_checkpoint(folders[step])


def prune_bases(checkpoints_dir: CheckpointPath, used: Collection[str], before_remove: Callable[[], None]) -> None:
    """Delete the bases that no checkpoint refers to, also none that was set aside as corrupt.

    Args:
        checkpoints_dir: where they lie.
        used: names of those that a checkpoint will refer to; they are not asked for.
        before_remove: called before each that is deleted; raises if the folder was lost.
    """
    unused = {folder.name: folder for folder in list_bases(checkpoints_dir) if folder.name not in used}
    if not unused:
        return
    try:
        folders = [*list_checkpoints(checkpoints_dir), *list_checkpoints(checkpoints_dir / CORRUPT_FOLDER)]
        referred = {read_manifest(folder).base for _, folder in folders}
    except UserError:
        # What one that cannot be read refers to is not known.
        return
    for name in unused.keys() - referred:
        before_remove()
        remove_checkpoint(unused[name])


def remove_checkpoints_after(checkpoints_dir: CheckpointPath, step: int, before_remove: Callable[[], None]) -> None:
    """Delete the checkpoints of later steps."""
    for later, folder in list_checkpoints(checkpoints_dir):
        if later > step:
            before_remove()
            remove_checkpoint(folder)


def _best_steps(folders: dict[int, CheckpointPath], monitor: str) -> list[int]:
    """Steps that were evaluated, the best first, a later one before an earlier one of the same value."""
    values, sign = {}, 1.0
    for step, folder in sorted(folders.items()):
        try:
            training = read_manifest(folder).training
        except UserError:
            # A corrupt one is no good to keep, and no reason to stop training.
            continue
        if monitor in training.eval_metrics:
            values[step] = training.eval_metrics[monitor]
        if training.monitor.metric == monitor:
            sign = -1.0 if training.monitor.better == "higher" else 1.0
    return sorted(values, key=lambda step: (sign * values[step], -step))
