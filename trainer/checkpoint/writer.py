"""Saving: each rank writes its slices, then rank 0 writes the manifest."""

import contextlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sharding.errors import RunFailure, UserError
from sharding.object_exchange import gather_objects
from sharding.process_group import Ranks
from sharding.state import TensorSlice
from trainer.checkpoint.manifest import (
    FORMAT_VERSION,
    Manifest,
    TensorEntry,
    TokenizerEntry,
    TrainingState,
    fingerprint,
    write_manifest,
)
from trainer.checkpoint.rank_file import RankReport, write_rank_file
from trainer.checkpoint.storage import CheckpointPath, make_folder, remove_checkpoint, sync_folder


@dataclass(frozen=True)
class CheckpointIdentity:
    """What a checkpoint says about the run it is of."""

    config: dict[str, Any]
    data_fingerprint: str
    strategy: str
    tokenizer: TokenizerEntry | None = None


def save_checkpoint(
    folder: CheckpointPath,
    slices: list[TensorSlice],
    training: TrainingState,
    identity: CheckpointIdentity,
    ranks: Ranks,
    before_commit: Callable[[], None],
) -> None:
    """Write one checkpoint and wait for it; every rank must call it.

    Args:
        folder: where it goes; leftovers of an unfinished save are removed.
        slices: this rank's canonical state.
        training: counters.
        identity: configuration and data.
        ranks: this rank's place.
        before_commit: called on rank 0 before the manifest is written; raises to give up.

    Raises:
        UserError: a rank could not write, for example for want of space; no rank has a checkpoint then.
    """
    prepare_checkpoint(folder, slices, training.step, ranks)
    commit_checkpoint(folder, write_rank_file(folder, slices, ranks.rank), training, identity, ranks, before_commit)


def prepare_checkpoint(folder: CheckpointPath, slices: list[TensorSlice], step: int, ranks: Ranks) -> None:
    """Make the folder, and check for space on all ranks; every rank must call it.

    Raises:
        UserError: a rank has too little space, say.
    """
    _give_up_if_any_failed(folder, gather_objects(_prepare_folder(folder, slices, ranks), ranks), step, ranks)


def commit_checkpoint(
    folder: CheckpointPath,
    report: RankReport,
    training: TrainingState,
    identity: CheckpointIdentity,
    ranks: Ranks,
    before_commit: Callable[[], None],
) -> float:
    """Make a checkpoint valid once this rank has written its part; every rank must call it, and waits for the others.

    Returns:
        Seconds that the slowest rank took to write its part.

    Raises:
        UserError: a rank could not write; no rank has a checkpoint then.
        RunFailure: the folder was lost; the same holds.
    """
    reports = gather_objects(report, ranks)
    _give_up_if_any_failed(folder, reports, training.step, ranks)
    error = None
    if ranks.rank == 0:
        error = _commit(folder, reports, training, identity, ranks, before_commit)
    error = gather_objects(error, ranks)[0]
    if error is not None:
        raise error
    return max(report.write_s for report in reports)


def _prepare_folder(folder: CheckpointPath, slices: list[TensorSlice], ranks: Ranks) -> RankReport:
    """Check for space before anything is written: a full disk found half-way costs the time of the whole save."""
    if ranks.rank == 0:
        try:
            remove_checkpoint(folder)
            make_folder(folder)
        except (OSError, UserError) as error:
            return RankReport(f"cannot create {folder}: {getattr(error, 'strerror', None) or error}")
    if not isinstance(folder, Path):
        return RankReport(None)
    num_bytes = sum(part.num_bytes for part in slices if part.is_written_here)
    try:
        # Not the folder itself: rank 0 may be removing what an unfinished save has left in it.
        parent = next(p for p in folder.parents if p.exists())
        free_bytes = shutil.disk_usage(parent).free
    except OSError as error:
        return RankReport(f"cannot look at the disk of {folder}: {error.strerror}")
    if num_bytes > free_bytes:
        return RankReport(f"needs {num_bytes:,} bytes, but {parent} has {free_bytes:,} bytes free")
    return RankReport(None)


def _give_up_if_any_failed(folder: CheckpointPath, reports: list[RankReport], step: int, ranks: Ranks) -> None:
    """Have all ranks, which know the same reports, give the checkpoint up together."""
    failed = [(rank, report.error) for rank, report in enumerate(reports) if report.error]
    if not failed:
        return
    if ranks.rank == 0:
        _discard(folder)
    rank, reason = failed[0]
    raise _not_saved(step, f"rank {rank}: {reason}")


def _commit(
    folder: CheckpointPath,
    reports: list[RankReport],
    training: TrainingState,
    identity: CheckpointIdentity,
    ranks: Ranks,
    before_commit: Callable[[], None],
) -> UserError | RunFailure | None:
    """Write the manifest on rank 0; returns why the checkpoint could not be made, if so."""
    tensors: dict[str, TensorEntry] = {}
    for report in reports:
        for name, dtype, shape, entry in report.slices:
            if name not in tensors:
                tensors[name] = TensorEntry(dtype=dtype, shape=shape, slices=[])
            tensors[name].slices.append(entry)
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        training=training,
        config=identity.config,
        config_fingerprint=fingerprint(identity.config),
        data_fingerprint=identity.data_fingerprint,
        num_ranks=ranks.world_size,
        strategy=identity.strategy,
        tokenizer=identity.tokenizer,
        tensors=tensors,
        files={report.file: report.file_entry for report in reports if report.file and report.file_entry}
        | {name: entry for report in reports for name, entry in report.attachments.items()},
    )
    try:
        # Where it fails, the folder may be another's by now.
        before_commit()
    except RunFailure as error:
        return error
    except OSError as error:
        return UserError(
            f"the checkpoint of step {training.step} could not be saved: {error}; run again to continue from the one "
            "before."
        )
    try:
        sync_folder(folder)
        write_manifest(folder, manifest)
    except UserError as error:
        # It says itself what to do.
        return UserError(f"the checkpoint of step {training.step} could not be saved: {error}")
    except OSError as error:
        _discard(folder)
        return _not_saved(training.step, str(error))
    return None


def _discard(folder: CheckpointPath) -> None:
    """Make room again; where a store or a disk is away, what is left has no manifest."""
    with contextlib.suppress(UserError, OSError):
        remove_checkpoint(folder)


def _not_saved(step: int, reason: str) -> UserError:
    return UserError(
        f"the checkpoint of step {step} could not be saved: {reason}; "
        "if the disk is full, free some space or lower checkpoint.keep_last; then run again to continue from the one "
        "before."
    )
