"""Saving: each rank writes its parts, then rank 0 writes the manifest."""

import contextlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sharding.part import Part
from sharding.ranks.errors import RunFailure, UserError
from sharding.ranks.object_exchange import error_of_rank_0, gather_objects, gather_rows
from sharding.ranks.process_group import Ranks
from trainer.checkpoint.manifest import (
    FORMAT_VERSION,
    FORMAT_VERSION_IN_16_BITS,
    FORMAT_VERSION_WITH_BASE,
    FileEntry,
    Manifest,
    TensorEntry,
    TokenizerEntry,
    fingerprint,
    write_manifest,
)
from trainer.checkpoint.rank_file import RankReport
from trainer.checkpoint.training_state import TrainingState
from trainer.files.outages import StorageOutage, blames_storage
from trainer.files.storage import CheckpointPath, make_folder, sync_names
from trainer.run_folder.listing import remove_checkpoint


@dataclass(frozen=True)
class CheckpointIdentity:
    """What a checkpoint says about the run it is of."""

    config: dict[str, Any]
    data_fingerprint: str
    strategy: str
    tokenizer: TokenizerEntry | None = None
    recipe_file: str | None = None
    base: str | None = None
    precision_rule: int | None = None


def prepare_checkpoint(
    folder: CheckpointPath, parts: list[Part], step: int, ranks: Ranks, before_change: Callable[[], None]
) -> None:
    """Make the folder, and check that all ranks' parts have space together; every rank must call it.

    Raises:
        UserError: there is too little space, say.
        RunFailure: the folder was lost, or the storage is away.
    """
    own = torch.tensor([sum(part.num_bytes for part in parts if part.is_written_here)])
    num_bytes = [int(row[0]) for row in gather_rows(own, ranks)]
    error = _prepare_folder(folder, num_bytes, step, before_change) if ranks.rank == 0 else None
    error = error_of_rank_0(error, ranks)
    if error is not None:
        raise error


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

    def write(reports: list[RankReport]) -> None:
        write_manifest(folder, _manifest(reports, training, identity, ranks))

    return commit(folder, report, training.step, write, ranks, before_commit)


def commit(
    folder: CheckpointPath,
    report: RankReport,
    step: int,
    write: Callable[[list[RankReport]], None],
    ranks: Ranks,
    before_commit: Callable[[], None],
) -> float:
    """As ``commit_checkpoint``, of any folder that a manifest makes valid.

    Args:
        folder: the folder.
        report: of what this rank has written there.
        step: to speak of.
        write: called on rank 0 with the reports of all ranks; writes the manifest.
        ranks: this rank's place.
        before_commit: called on rank 0 before anything is changed; raises if the folder was lost.
    """
    reports = gather_objects(report, ranks)
    _give_up_if_any_failed(folder, reports, step, ranks, before_commit)
    error = None
    if ranks.rank == 0:
        error = _commit(folder, lambda: write(reports), step, before_commit)
    error = error_of_rank_0(error, ranks)
    if error is not None:
        raise error
    return max(report.write_s for report in reports)


def tensors_of(reports: list[RankReport]) -> dict[str, TensorEntry]:
    """The tensors that ranks have written parts of, by name."""
    tensors: dict[str, TensorEntry] = {}
    for report in reports:
        for name, dtype, shape, entry in report.slices:
            if name not in tensors:
                tensors[name] = TensorEntry(dtype=dtype, shape=shape, slices=[])
            tensors[name].slices.append(entry)
    return tensors


def files_of(reports: list[RankReport]) -> dict[str, FileEntry]:
    """The files that ranks have written, by name."""
    return {report.file: report.file_entry for report in reports if report.file and report.file_entry} | {
        name: entry for report in reports for name, entry in report.attachments.items()
    }


def _prepare_folder(
    folder: CheckpointPath, num_bytes: list[int], step: int, before_change: Callable[[], None]
) -> UserError | RunFailure | None:
    """Make the folder; returns why it cannot be, or why it has too little space for what each rank would write.

    A full disk found half-way costs the time of the whole save. All ranks write into this one folder, so it is one file
    system that must hold all their parts, whatever each machine calls it.
    """
    try:
        # What is there may be a checkpoint of whoever has taken the run over.
        before_change()
        remove_checkpoint(folder)
        make_folder(folder)
        free_bytes = shutil.disk_usage(folder).free if isinstance(folder, Path) else None
    except RunFailure as error:
        return error
    except (OSError, UserError) as error:
        reason = f"cannot create {folder}: {getattr(error, 'strerror', None) or error}"
        return _not_saved(step, reason, is_outage=isinstance(error, OSError) and blames_storage(error))
    if free_bytes is None or sum(num_bytes) <= free_bytes:
        return None
    _discard(folder, before_change)
    parts = f"{len(num_bytes)} ranks write {sum(num_bytes):,} bytes together, up to {max(num_bytes):,} each"
    if len(num_bytes) == 1:
        parts = f"it has {num_bytes[0]:,} bytes"
    return _not_saved(step, f"{parts}, but {folder.parent} has {free_bytes:,} bytes free")


def _give_up_if_any_failed(
    folder: CheckpointPath, reports: list[RankReport], step: int, ranks: Ranks, before_change: Callable[[], None]
) -> None:
    """Have all ranks, which know the same reports, give the checkpoint up together."""
    failed = [(rank, report.error) for rank, report in enumerate(reports) if report.error]
    if not failed:
        return
    if ranks.rank == 0:
        _discard(folder, before_change)
    rank, reason = failed[0]
    raise _not_saved(step, f"rank {rank}: {reason}", is_outage=reports[rank].is_outage)


def _manifest(
    reports: list[RankReport], training: TrainingState, identity: CheckpointIdentity, ranks: Ranks
) -> Manifest:
    version = FORMAT_VERSION if identity.base is None else FORMAT_VERSION_WITH_BASE
    return Manifest(
        format_version=version if identity.precision_rule is None else FORMAT_VERSION_IN_16_BITS,
        training=training,
        config=identity.config,
        config_fingerprint=fingerprint(identity.config),
        data_fingerprint=identity.data_fingerprint,
        num_ranks=ranks.world_size,
        strategy=identity.strategy,
        tokenizer=identity.tokenizer,
        recipe_file=identity.recipe_file,
        tensors=tensors_of(reports),
        files=files_of(reports),
        base=identity.base,
        precision_rule=identity.precision_rule,
    )


def _commit(
    folder: CheckpointPath, write: Callable[[], None], step: int, before_commit: Callable[[], None]
) -> UserError | RunFailure | None:
    """Write the manifest on rank 0; returns why the checkpoint could not be made, if so."""
    try:
        before_commit()
        sync_names(folder)
        write()
    except RunFailure as error:
        return error
    except UserError as error:
        # It says itself what to do.
        return UserError(f"the checkpoint of step {step} could not be saved: {error}")
    except OSError as error:
        _discard(folder, before_commit)
        return _not_saved(step, str(error), is_outage=blames_storage(error))
    return None


def _discard(folder: CheckpointPath, before_change: Callable[[], None]) -> None:
    """Make room again; where a store or a disk is away, what is left has no manifest. A lost folder is left alone."""
    with contextlib.suppress(UserError, RunFailure, OSError):
        before_change()
        remove_checkpoint(folder)


def _not_saved(step: int, reason: str, *, is_outage: bool = False) -> UserError | StorageOutage:
    if is_outage:
        return StorageOutage(
            f"the checkpoint of step {step} could not be saved: {reason}; run again to continue from the one before."
        )
    return UserError(
        f"the checkpoint of step {step} could not be saved: {reason}; "
        "if the disk is full, free some space or lower checkpoint.keep_last; then run again to continue from the one "
        "before."
    )
