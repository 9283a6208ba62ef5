"""Saving: each rank writes its slices, then rank 0 writes the manifest."""

import errno
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from sharding.errors import UserError
from sharding.process_group import Ranks
from sharding.state import TensorSlice
from trainer.checkpoint.manifest import (
    FORMAT_VERSION,
    FileEntry,
    Manifest,
    SliceEntry,
    TensorEntry,
    TrainingState,
    fingerprint,
    hash_file,
    sync_folder,
    write_manifest,
)


@dataclass(frozen=True)
class CheckpointIdentity:
    """What a checkpoint says about the run it is of."""

    config: dict[str, Any]
    data_fingerprint: str
    strategy: str


@dataclass(frozen=True)
class _RankReport:
    """What one rank tells the others after writing: its file and slices, or why it could not."""

    error: str | None
    file: str | None = None
    file_entry: FileEntry | None = None
    slices: tuple[tuple[str, str, list[int], SliceEntry], ...] = ()


def save_checkpoint(
    folder: Path,
    slices: list[TensorSlice],
    training: TrainingState,
    identity: CheckpointIdentity,
    ranks: Ranks,
    before_commit: Callable[[], None],
) -> None:
    """Write one checkpoint; every rank must call it.

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
    if ranks.rank == 0:
        remove_checkpoint(folder)
    reports = _gather(_prepare_folder(folder, slices, ranks), ranks)
    if not any(report.error for report in reports):
        reports = _gather(_write_rank_file(folder, slices, ranks), ranks)
    outcome = None
    if ranks.rank == 0:
        outcome = _commit(folder, reports, training, identity, ranks, before_commit)
    outcome = _gather(_RankReport(outcome), ranks)[0].error
    if outcome is not None:
        raise UserError(outcome)


def remove_checkpoint(folder: Path) -> None:
    """Delete a checkpoint, manifest first, so that it is never half there."""
    (folder / "manifest.json").unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def prune_checkpoints(checkpoints_dir: Path, keep_last: int, keep_every: int) -> None:
    """Delete all but the last ``keep_last`` checkpoints and those at multiples of ``keep_every`` steps.

    A ``keep_last`` of 0 keeps all.
    """
    if keep_last == 0:
        return
    steps = sorted(int(m.parent.name.removeprefix("step-")) for m in checkpoints_dir.glob("step-*/manifest.json"))
    for step in steps[:-keep_last]:
        if keep_every == 0 or step % keep_every:
            remove_checkpoint(checkpoints_dir / f"step-{step:08d}")


def remove_checkpoints_after(checkpoints_dir: Path, step: int) -> None:
    """Delete the checkpoints of later steps."""
    for manifest in checkpoints_dir.glob("step-*/manifest.json"):
        if int(manifest.parent.name.removeprefix("step-")) > step:
            remove_checkpoint(manifest.parent)


def _prepare_folder(folder: Path, slices: list[TensorSlice], ranks: Ranks) -> _RankReport:
    """Check for space before anything is written: a full disk found half-way costs the time of the whole save."""
    if ranks.rank == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            return _RankReport(f"cannot create {folder}: {error.strerror}")
    parent = next(p for p in (folder, *folder.parents) if p.exists())
    num_bytes = sum(part.num_bytes for part in slices if part.is_written_here)
    free_bytes = shutil.disk_usage(parent).free
    if num_bytes > free_bytes:
        return _RankReport(f"needs {num_bytes:,} bytes, but {parent} has {free_bytes:,} bytes free")
    return _RankReport(None)


def _write_rank_file(folder: Path, slices: list[TensorSlice], ranks: Ranks) -> _RankReport:
    file = f"rank-{ranks.rank:05d}.safetensors"
    written = [part for part in slices if part.is_written_here]
    if not written:
        return _RankReport(None)
    path = folder / file
    try:
        save_file({_key(part): _own_memory(part.tensor) for part in written}, path)
        with path.open("rb") as opened:
            os.fsync(opened.fileno())
        entry = FileEntry(num_bytes=path.stat().st_size, sha256=hash_file(path))
    except Exception as error:  # noqa: BLE001 - whatever went wrong here must reach the other ranks, who wait
        reason = "no space left on device" if getattr(error, "errno", None) == errno.ENOSPC else str(error)
        return _RankReport(f"cannot write {path}: {reason}")
    entries = tuple(
        (
            part.name,
            str(part.tensor.dtype).removeprefix("torch."),
            list(part.global_shape),
            SliceEntry(file=file, key=_key(part), offsets=list(part.offsets), shape=list(part.tensor.shape)),
        )
        for part in written
    )
    return _RankReport(None, file, entry, entries)


def _own_memory(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor as the file format takes it. A flat partition has one count of steps for all of its parameters."""
    return tensor.contiguous() if tensor.ndim else tensor.clone()


def _key(part: TensorSlice) -> str:
    """The tensor's name where the part begins it, so that a file of whole tensors reads like any other."""
    return f"{part.name}@{','.join(map(str, part.offsets))}" if any(part.offsets) else part.name


def _commit(
    folder: Path,
    reports: list[_RankReport],
    training: TrainingState,
    identity: CheckpointIdentity,
    ranks: Ranks,
    before_commit: Callable[[], None],
) -> str | None:
    """Write the manifest on rank 0; returns why the checkpoint could not be made, if so."""
    failed = [(rank, report.error) for rank, report in enumerate(reports) if report.error]
    if failed:
        rank, reason = failed[0]
        remove_checkpoint(folder)
        return (
            f"the checkpoint of step {training.step} could not be saved: rank {rank}: {reason}; "
            "free some space or lower checkpoint.keep_last, then run again to continue from the one before."
        )
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
        tensors=tensors,
        files={report.file: report.file_entry for report in reports if report.file and report.file_entry},
    )
    try:
        before_commit()
        sync_folder(folder)
        write_manifest(folder, manifest)
    except (UserError, OSError) as error:
        return f"the checkpoint of step {training.step} could not be saved: {error}"
    return None


def _gather(report: _RankReport, ranks: Ranks) -> list[_RankReport]:
    if ranks.world_size == 1:
        return [report]
    reports: list[Any] = [None] * ranks.world_size
    dist.all_gather_object(reports, report)
    return reports
