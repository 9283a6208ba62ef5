"""wandb's own files in a run's folder: which steps each attempt left there. Reads them without a server.

A ``.wandb`` file is a header of 7 bytes, then LevelDB's log format with messages of wandb's protobuf schema.
wandb writes it from another process, with a delay: what was sent before a kill need not be there.
"""

import os
import shutil
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ATTEMPT_KEY = "attempt"
_HEADER_BYTES = 7
_BLOCK_BYTES = 1 << 15
_CHUNK_HEADER_BYTES = 7
_WHOLE, _FIRST, _MIDDLE, _LAST = _KINDS = b"\1", b"\2", b"\3", b"\4"


@dataclass(frozen=True)
class WandbPart:
    """What one attempt left.

    Attributes:
        file: the ``.wandb`` file.
        attempt: number of the attempt; None where the file ends before it says so.
        is_offline: whether it waits to be uploaded; else wandb uploaded it while it was written.
        is_synced: whether it was uploaded later.
        steps: logged steps, in the order of the file.
        whole_bytes: size of the part of the file that can be read; less than the file where a kill tore a record.
    """

    file: Path
    attempt: int | None
    is_offline: bool
    is_synced: bool
    steps: tuple[int, ...]
    whole_bytes: int

    @property
    def is_waiting(self) -> bool:
        """Whether it is still to be uploaded."""
        return self.is_offline and not self.is_synced

    @property
    def last_step(self) -> int:
        """The last logged step; 0 where there is none."""
        return max(self.steps, default=0)

    @property
    def is_torn(self) -> bool:
        """Whether the end of the file is half a record."""
        return self.file.stat().st_size > self.whole_bytes


def read_parts(run_dir: Path, run_id: str) -> list[WandbPart]:
    """All parts of a run, in the order of their attempts (wandb puts the time into a folder's name)."""
    folders = [path.parent for path in (run_dir / "wandb").glob(f"*run-*-{run_id}/run-{run_id}.wandb")]
    return [_read_part(folder, run_id) for folder in sorted(folders, key=lambda f: f.name.removeprefix("offline-"))]


def read_records(file: Path) -> Iterator[tuple[Any, int]]:
    """The records of a ``.wandb`` file, as messages of wandb's schema, each with the position in bytes after it.

    Half a record at the end, as a kill leaves it, ends the file; so does one that cannot be read.
    """
    from google.protobuf.message import DecodeError
    from wandb.proto.wandb_internal_pb2 import Record

    for message, position in _read_log(file.read_bytes()):
        try:
            record = Record.FromString(message)
        except DecodeError:
            return
        yield record, position


def drop_from_part(part: WandbPart, sent_step: int) -> None:
    """Rewrite a part without half a record at its end and without the history up to a step.

    What was there before stays beside it as ``.wandb.original``.

    Args:
        part: a part that nobody writes to.
        sent_step: last step that is with the server already.
    """
    messages = [
        record.SerializeToString()
        for record, _ in read_records(part.file)
        if not record.HasField("history") or max(_steps_of(record.history), default=sent_step + 1) > sent_step
    ]
    content = part.file.read_bytes()[:_HEADER_BYTES] + b"".join(_log_chunks(messages))
    original = part.file.with_suffix(".wandb.original")
    if not original.exists():
        shutil.copy2(part.file, original)
    temporary = part.file.with_suffix(".partial")
    temporary.write_bytes(content)
    os.replace(temporary, part.file)


def _steps_of(history: Any) -> list[int]:
    return [int(item.value_json) for item in history.item if metric_name(item) == "step"]


def metric_name(item: Any) -> str:
    """The metric that an item of a history record is of."""
    return item.key or "/".join(item.nested_key)


def _read_part(folder: Path, run_id: str) -> WandbPart:
    file = folder / f"run-{run_id}.wandb"
    steps, attempt, whole_bytes = [], None, _HEADER_BYTES
    for record, position in read_records(file):
        whole_bytes = position
        if record.HasField("history"):
            steps += _steps_of(record.history)
        elif record.HasField("run"):
            settings = {item.key: item.value_json for item in record.run.config.update}
            attempt = int(settings[ATTEMPT_KEY]) if ATTEMPT_KEY in settings else attempt
    return WandbPart(
        file=file,
        attempt=attempt,
        is_offline=folder.name.startswith("offline-"),
        is_synced=file.with_suffix(".wandb.synced").exists(),
        steps=tuple(steps),
        whole_bytes=whole_bytes,
    )


def _read_log(content: bytes) -> Iterator[tuple[bytes, int]]:
    position, message = _HEADER_BYTES, b""
    while True:
        left = _BLOCK_BYTES - position % _BLOCK_BYTES
        if left < _CHUNK_HEADER_BYTES:
            # No header fits: padding.
            position += left
            continue
        start = position + _CHUNK_HEADER_BYTES
        size, kind = int.from_bytes(content[position + 4 : position + 6], "little"), content[position + 6 : start]
        if start + size > len(content) or kind not in _KINDS:
            return
        chunk = content[start : start + size]
        message = chunk if kind in (_WHOLE, _FIRST) else message + chunk
        position = start + size
        if kind in (_WHOLE, _LAST):
            yield message, position


def _log_chunks(messages: Iterable[bytes]) -> Iterator[bytes]:
    position = _HEADER_BYTES
    for message in messages:
        start, is_last = 0, False
        while not is_last:
            left = _BLOCK_BYTES - position % _BLOCK_BYTES
            if left < _CHUNK_HEADER_BYTES:
                yield bytes(left)
                position, left = position + left, _BLOCK_BYTES
            size = min(left - _CHUNK_HEADER_BYTES, len(message) - start)
            is_last = start + size == len(message)
            kind = (_WHOLE if is_last else _FIRST) if start == 0 else (_LAST if is_last else _MIDDLE)
            # The checksum is of kind and content.
            checked = kind + message[start : start + size]
            yield zlib.crc32(checked).to_bytes(4, "little") + size.to_bytes(2, "little") + checked
            start, position = start + size, position + _CHUNK_HEADER_BYTES + size
