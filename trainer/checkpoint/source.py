"""What a run starts from: the newest of its checkpoints that is complete, or another run's."""

import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from sharding.ranks.errors import RunFailure, UserError
from sharding.ranks.object_exchange import broadcast_object, error_of_rank_0, gather_objects
from sharding.ranks.process_group import Ranks
from trainer.checkpoint.manifest import CorruptCheckpoint, FileEntry
from trainer.checkpoint.reader import CheckpointReader
from trainer.checkpoint.reference import refuse_all_corrupt, resolve_checkpoint
from trainer.config.checkpoint import CheckpointConfig
from trainer.files.outages import StorageOutage, blames_storage
from trainer.files.storage import CheckpointPath, list_folders, make_folder
from trainer.run_folder.events import record_event
from trainer.run_folder.folder import RunFolder
from trainer.run_folder.listing import move_checkpoint

# A network file system may keep what it knows of a folder for so long.
SEEN_WITHIN_S = 90.0
_LOOK_EVERY_S = 0.5
_Fault = UserError | RunFailure


@dataclass(frozen=True)
class Source:
    """A checkpoint that was found complete.

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

    Each rank verifies its share. A checkpoint of this run that is corrupt is moved out of the way, and the one before
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
        UserError: all checkpoints of this run are corrupt, or the one of another run is, or there is none.
        RunFailure: the folder was lost, the storage is away, or a rank does not see what rank 0 does.
    """
    while True:
        # Rank 0 chooses, since a shared file system may show ranks different listings.
        chosen = _choose(settings, run_folder, last_step) if ranks.rank == 0 else (None, False, None)
        folder, is_own, refusal = broadcast_object(chosen, ranks)
        if refusal is not None:
            raise refusal
        if folder is None:
            return None
        reader, reason = _open_and_verify(folder, ranks)
        if reader is not None:
            return Source(reader, is_own, weights_only=not is_own and settings.load == "weights")
        if not is_own:
            raise CorruptCheckpoint(folder, reason)
        on_rank_0(partial(_set_aside, folder, reason, run_folder, before_change, warn), ranks)


def on_rank_0(change: Callable[[], None], ranks: Ranks) -> None:
    """Check or change something on rank 0, and raise on all ranks what it raises there; every rank must call it.

    Raises:
        UserError: rank 0 has raised one.
        RunFailure: the same; also where a file system was in the way.
    """
    error: _Fault | None = None
    if ranks.rank == 0:
        try:
            change()
        except (UserError, RunFailure) as caught:
            error = caught
        except OSError as caught:
            error = RunFailure(f"{caught.filename or 'a file'} cannot be changed: {caught.strerror}; run again.")
    error = error_of_rank_0(error, ranks)
    if error is not None:
        raise error


def _choose(
    settings: CheckpointConfig, run_folder: RunFolder, last_step: int | None
) -> tuple[CheckpointPath | None, bool, _Fault | None]:
    """The checkpoint to try, whether it is the run's own, and why there can be none."""
    try:
        newest = run_folder.newest_checkpoint(last_step)
        if last_step is not None:
            return (None if newest is None else newest[1]), True, None
        if newest is not None:
            return newest[1], True, None
        refuse_all_corrupt(run_folder)
        return (None if settings.from_ is None else resolve_checkpoint(settings.from_)), False, None
    except RunFailure as error:
        return None, False, error
    except OSError as error:
        return None, False, StorageOutage(str(error)) if blames_storage(error) else UserError(str(error))
    except UserError as error:
        return None, False, UserError(str(error))


def _open_and_verify(folder: CheckpointPath, ranks: Ranks) -> tuple[CheckpointReader | None, str]:
    """Open a checkpoint on all ranks, and verify this rank's share; None, and how, where it is corrupt.

    Raises:
        UserError: it is of another version, say.
        RunFailure: the storage is away, or a rank does not see what rank 0 does.
    """
    reader, fault = _open(folder) if ranks.rank == 0 else (None, None)
    seen = reader.files if reader is not None else {}
    seen, fault = broadcast_object((seen, fault), ranks)
    if fault is None and reader is None:
        reader, fault = _open_once_seen(folder, seen)
    if reader is not None:
        fault = _verify_share(reader, ranks)
    faults = [fault for fault in gather_objects(fault, ranks) if fault is not None]
    # Where a rank cannot look, nothing is known of the checkpoint, whatever another has found.
    for other in sorted(faults, key=lambda fault: not isinstance(fault, RunFailure)):
        if not isinstance(other, CorruptCheckpoint):
            raise other
        return None, other.reason
    return reader, ""


def _open(folder: CheckpointPath) -> tuple[CheckpointReader | None, _Fault | None]:
    try:
        return CheckpointReader(folder), None
    except (UserError, RunFailure) as error:
        return None, error


def _open_once_seen(
    folder: CheckpointPath, wanted: Mapping[str, FileEntry]
) -> tuple[CheckpointReader | None, _Fault | None]:
    """Open a checkpoint that rank 0 has opened: on a network file system it may be there for others only later."""
    until = time.monotonic() + SEEN_WITHIN_S
    while True:
        reader, fault = _open(folder)
        if reader is not None and reader.files == wanted:
            return reader, None
        if time.monotonic() > until:
            sees = fault or f"{folder} has a manifest of other files"
            return None, RunFailure(
                f"{socket.gethostname()} does not see what rank 0 does, which has opened {folder}: {sees} (for "
                f"{SEEN_WITHIN_S:g} s); its mount lags behind, or is of something else; mend it, and run again."
            )
        time.sleep(_LOOK_EVERY_S)
        # Has a network file system ask its server anew what is there.
        with suppress(OSError, UserError, RunFailure):
            list_folders(folder.parent)


def _verify_share(reader: CheckpointReader, ranks: Ranks) -> _Fault | None:
    try:
        reader.verify(ranks.rank, ranks.world_size)
    except (UserError, RunFailure) as error:
        return error
    return None


def _set_aside(
    folder: CheckpointPath,
    reason: str,
    run_folder: RunFolder,
    before_change: Callable[[], None],
    warn: Callable[[str], None],
) -> None:
    before_change()
    newest = run_folder.newest_checkpoint()
    step = 0 if newest is None else newest[0]
    make_folder(run_folder.corrupt_dir)
    target = run_folder.corrupt_dir / folder.name
    number = 1
    while target.exists():
        number += 1
        target = run_folder.corrupt_dir / f"{folder.name}.{number}"
    move_checkpoint(folder, target)
    attempt = run_folder.newest_attempt()
    record_event(run_folder.path, "checkpoint_damaged", attempt=attempt, step=step, path=str(target), reason=reason)
    warn(f"checkpoint {folder} is corrupt ({reason}): it was moved to {target}, and the one before it is tried")
