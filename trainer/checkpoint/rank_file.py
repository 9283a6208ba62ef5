"""The file that one rank writes of a checkpoint."""

import errno
import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from sharding.part import Box, Part
from trainer.checkpoint.manifest import FileEntry, SliceEntry
from trainer.checkpoint.safetensors_file import write_tensors
from trainer.files.outages import StorageOutage, blames_storage
from trainer.files.storage import CheckpointPath, write_whole


@dataclass(frozen=True)
class RankReport:
    """What one rank tells the others: its file and slices, or why it could not write them.

    Attributes:
        error: why it could not.
        file: name of its file, if it had something to write.
        file_entry: size and hash.
        slices: name, type and global shape of each tensor in it, and where which part of it is.
        write_s: seconds that writing took.
        attachments: size and hash of other files that it wrote, by name.
        is_outage: whether the error is a storage that is away, and no fault of the input.
    """

    error: str | None
    file: str | None = None
    file_entry: FileEntry | None = None
    slices: tuple[tuple[str, str, list[int], SliceEntry], ...] = ()
    write_s: float = 0.0
    attachments: dict[str, FileEntry] = field(default_factory=dict)
    is_outage: bool = False


def write_rank_file(
    folder: CheckpointPath,
    parts: list[Part],
    rank: int,
    before_write: Callable[[], None] = lambda: None,
    attachments: Mapping[str, bytes] | None = None,
) -> RankReport:
    """Write those of a rank's parts that it is to write; an error becomes part of the report.

    Args:
        folder: the checkpoint.
        parts: the rank's canonical state.
        rank: its number.
        before_write: called first; what it raises counts as an error of writing.
        attachments: contents of small files that it is to write beside, by name.
    """
    started_at = time.perf_counter()
    file = f"rank-{rank:05d}.safetensors"
    written = [(part, box, piece) for part in parts if part.is_written_here for box, piece in part.pieces()]
    path = folder / file
    attached: dict[str, FileEntry] = {}
    try:
        before_write()
        for name, contents in (attachments or {}).items():
            write_whole(folder / name, contents)
            attached[name] = FileEntry(num_bytes=len(contents), sha256=hashlib.sha256(contents).hexdigest())
        if not written:
            return RankReport(None, attachments=attached)
        entry = write_tensors(path, {_key(part, box): piece for part, box, piece in written})
    except Exception as error:  # noqa: BLE001 - whatever went wrong here must reach the other ranks, who wait
        reason = "no space left on device" if getattr(error, "errno", None) == errno.ENOSPC else str(error)
        is_away = isinstance(error, StorageOutage) or (isinstance(error, OSError) and blames_storage(error))
        return RankReport(f"cannot write {path}: {reason}", is_outage=is_away)
    entries = tuple(
        (
            part.name,
            str(part.tensor.dtype).removeprefix("torch."),
            list(part.global_shape),
            SliceEntry(file=file, key=_key(part, box), offsets=list(box.offsets), shape=list(box.shape)),
        )
        for part, box, _ in written
    )
    return RankReport(None, file, entry, entries, time.perf_counter() - started_at, attached)


def _key(part: Part, box: Box) -> str:
    """The tensor's name where the box begins it, so that a file of whole tensors reads like any other."""
    return f"{part.name}@{','.join(map(str, box.offsets))}" if any(box.offsets) else part.name
