"""The file that one rank writes of a checkpoint."""

import errno
import time
from collections.abc import Callable
from dataclasses import dataclass

from sharding.state import TensorSlice
from trainer.checkpoint.manifest import FileEntry, SliceEntry
from trainer.checkpoint.safetensors_file import write_tensors
from trainer.checkpoint.storage import CheckpointPath


@dataclass(frozen=True)
class RankReport:
    """What one rank tells the others: its file and slices, or why it could not write them.

    Attributes:
        error: why it could not.
        file: name of its file, if it had something to write.
        file_entry: size and hash.
        slices: name, type and global shape of each tensor in it, and where which part of it is.
        write_s: seconds that writing took.
    """

    error: str | None
    file: str | None = None
    file_entry: FileEntry | None = None
    slices: tuple[tuple[str, str, list[int], SliceEntry], ...] = ()
    write_s: float = 0.0


def write_rank_file(
    folder: CheckpointPath, slices: list[TensorSlice], rank: int, before_write: Callable[[], None] = lambda: None
) -> RankReport:
    """Write those of a rank's slices that it is to write; an error becomes part of the report.

    Args:
        folder: the checkpoint.
        slices: the rank's canonical state.
        rank: its number.
        before_write: called first; what it raises counts as an error of writing.
    """
    started_at = time.perf_counter()
    file = f"rank-{rank:05d}.safetensors"
    written = [part for part in slices if part.is_written_here]
    path = folder / file
    try:
        before_write()
        if not written:
            return RankReport(None)
        entry = write_tensors(path, {_key(part): part.tensor for part in written})
    except Exception as error:  # noqa: BLE001 - whatever went wrong here must reach the other ranks, who wait
        reason = "no space left on device" if getattr(error, "errno", None) == errno.ENOSPC else str(error)
        return RankReport(f"cannot write {path}: {reason}")
    entries = tuple(
        (
            part.name,
            str(part.tensor.dtype).removeprefix("torch."),
            list(part.global_shape),
            SliceEntry(file=file, key=_key(part), offsets=list(part.offsets), shape=list(part.tensor.shape)),
        )
        for part in written
    )
    return RankReport(None, file, entry, entries, time.perf_counter() - started_at)


def _key(part: TensorSlice) -> str:
    """The tensor's name where the part begins it, so that a file of whole tensors reads like any other."""
    return f"{part.name}@{','.join(map(str, part.offsets))}" if any(part.offsets) else part.name
