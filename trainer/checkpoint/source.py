"""What a run starts from: the newest of its checkpoints that is whole, or another run's."""

from collections.abc import Callable
from dataclasses import dataclass

from sharding.errors import UserError
from sharding.object_exchange import broadcast_object, gather_objects
from sharding.process_group import Ranks
from trainer.checkpoint.config import CheckpointConfig
from trainer.checkpoint.manifest import DamagedCheckpoint
from trainer.checkpoint.reader import CheckpointReader
from trainer.checkpoint.reference import resolve_checkpoint
from trainer.checkpoint.storage import CheckpointPath, make_folder, move_checkpoint
from trainer.events import record_event
from trainer.run_folder import RunFolder


@dataclass(frozen=True)
class Source:
    """A checkpoint that was found whole.

    Attributes:
        reader: the checkpoint.
        is_own: whether it is one of the run's own.
        weights_only: whether the parameters alone are to be taken.
    """

    reader: CheckpointReader
    is_own: bool
    weights_only: bool


def open_source(
    settings: CheckpointConfig,
    run_folder: RunFolder,
    ranks: Ranks,
    before_change: Callable[[], None],
    warn: Callable[[str], None],
    last_step: int | None = None,
) -> Source | None:
    """Find the checkpoint to start from and verify it; every rank must call it.

    Each rank verifies its share. A checkpoint of this run that is damaged is moved out of the way, and the one before
    it is tried; another run's is left as it is.

    Args:
        settings: what to start from.
        run_folder: the run.
        ranks: this rank's place.
        before_change: called on rank 0 before anything is moved; raises if the folder was lost.
        warn: tells a person, on rank 0.
        last_step: look among the run's own checkpoints alone, up to this step.

    Returns:
        None where the run starts from nothing.

    Raises:
        UserError: all checkpoints of this run are damaged, or the one of another run is, or there is none.
    """
    while True:
        # Rank 0 chooses, since a shared file system may show ranks different listings.
        chosen = _choose(settings, run_folder, last_step) if ranks.rank == 0 else (None, False, None)
        folder, is_own, refusal = broadcast_object(chosen, ranks)
        if refusal is not None:
            raise UserError(refusal)
        if folder is None:
            return None
        reader, reason = _verify_share(folder, ranks)
        reasons = [reason for reason in gather_objects(reason, ranks) if reason is not None]
        if not reasons and reader is not None:
            return Source(reader, is_own, weights_only=not is_own and settings.load == "weights")
        if not is_own:
            raise DamagedCheckpoint(folder, reasons[0])
        if ranks.rank == 0:
            before_change()
            _set_aside(folder, reasons[0], run_folder, warn)


def _choose(
    settings: CheckpointConfig, run_folder: RunFolder, last_step: int | None
) -> tuple[CheckpointPath | None, bool, str | None]:
    """The checkpoint to try, whether it is the run's own, and why there can be none."""
    try:
        newest = run_folder.newest_checkpoint(last_step)
        if last_step is not None:
            return (None if newest is None else newest[1]), True, None
        if newest is not None:
            return newest[1], True, None
        run_folder.check_damaged()
        return (None if settings.from_ is None else resolve_checkpoint(settings.from_)), False, None
    except (UserError, OSError) as error:
        return None, False, str(error)


def _verify_share(folder: CheckpointPath, ranks: Ranks) -> tuple[CheckpointReader | None, str | None]:
    try:
        reader = CheckpointReader(folder)
        reader.verify(ranks.rank, ranks.world_size)
    except DamagedCheckpoint as error:
        return None, error.reason
    return reader, None


def _set_aside(folder: CheckpointPath, reason: str, run_folder: RunFolder, warn: Callable[[str], None]) -> None:
    newest = run_folder.newest_checkpoint()
    step = 0 if newest is None else newest[0]
    make_folder(run_folder.damaged_dir)
    target = run_folder.damaged_dir / folder.name
    number = 1
    while target.exists():
        number += 1
        target = run_folder.damaged_dir / f"{folder.name}.{number}"
    move_checkpoint(folder, target)
    attempt = run_folder.newest_attempt()
    record_event(run_folder.path, "checkpoint_damaged", attempt=attempt, step=step, path=str(target), reason=reason)
    warn(f"checkpoint {folder} is damaged ({reason}): it was moved to {target}, and the one before it is tried")
