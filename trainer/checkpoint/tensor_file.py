"""Reading parts of a safetensors file, wherever it lies, through little memory.

Pages of a mapped file count as this process's memory as long as they stay, and a mapped file that shrinks kills whoever
reads it; so parts are read, not mapped.
"""

import json
import math
from typing import Any

import torch

from trainer.checkpoint.layout import HEADER_DTYPES
from trainer.files.storage import CheckpointPath, file_size, reaching

_CHUNK_BYTES = 8 * 2**20
# The limit of the safetensors library.
_MAX_HEADER_BYTES = 100_000_000
DTYPES = {code: getattr(torch, name) for name, code in HEADER_DTYPES.items()}


class TensorFile:
    """One safetensors file, open for reading.

    Attributes:
        header: type, as the header has it, and shape of each tensor by key.
    """

    def __init__(self, path: CheckpointPath) -> None:
        """Open a file and read its header.

        Raises:
            ValueError: it is not a safetensors file.
            OSError: it cannot be read.
        """
        self._file: Any = None
        self._path = path
        self._num_bytes = file_size(path)
        with reaching(path):
            self._file = path.open("rb")
        header_bytes = int.from_bytes(self._read(0, 8), "little")
        if header_bytes > min(_MAX_HEADER_BYTES, self._num_bytes - 8):
            raise ValueError(f"its header cannot have {header_bytes} bytes")
        self._data_start = 8 + header_bytes
        self.header: dict[str, tuple[str, list[int]]] = {}
        self._starts: dict[str, int] = {}
        values = json.loads(self._read(8, header_bytes))
        if not isinstance(values, dict):
            raise ValueError("its header is not a JSON object")
        for key, entry in values.items():
            if key != "__metadata__":
                self._add(key, entry)

    def read_into(self, key: str, index: tuple[slice, ...], target: torch.Tensor) -> None:
        """Copy a box of a stored tensor to ``target``, which has its shape, a few rows at a time.

        Args:
            key: the stored tensor's.
            index: first element and end of the box, per dim.
            target: is written to, on any device.

        Raises:
            ValueError: the file ends early.
            OSError: it cannot be read.
        """
        code, shape = self.header[key]
        dtype, start = DTYPES[code], self._starts[key]
        if not shape:
            target.copy_(torch.frombuffer(self._read(start, dtype.itemsize), dtype=dtype)[0])
            return
        row_bytes = dtype.itemsize * math.prod(shape[1:])
        first, last = index[0].start, index[0].stop
        num_rows = max(1, _CHUNK_BYTES // max(row_bytes, 1))
        for row in range(first, last, num_rows):
            end = min(row + num_rows, last)
            if not target.numel():
                return
            content = self._read(start + row * row_bytes, (end - row) * row_bytes)
            rows = torch.frombuffer(content, dtype=dtype).view(end - row, *shape[1:])
            target[row - first : end - first].copy_(rows[(slice(None), *index[1:])])

    def close(self) -> None:
        """Close it."""
        if self._file is not None:
            self._file.close()

    def __del__(self) -> None:
        """Nothing is written: whoever has read what it needs may let go of it."""
        self.close()

    def _add(self, key: str, entry: Any) -> None:
        try:
            code, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            dtype = DTYPES[code]
            sizes_fit = end - begin == dtype.itemsize * math.prod(shape) and all(size >= 0 for size in shape)
            is_inside = 0 <= begin <= end <= self._num_bytes - self._data_start
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"its header says nothing sensible of {key}") from None
        if not (sizes_fit and is_inside):
            raise ValueError(f"its header has {key} at {begin} to {end}, which does not fit {code} {shape} or the file")
        self.header[key] = (code, shape)
        self._starts[key] = self._data_start + begin

    def _read(self, start: int, num_bytes: int) -> bytearray:
        content = bytearray(num_bytes)
        view, position = memoryview(content), 0
        with reaching(self._path):
            self._file.seek(start)
            while position < num_bytes and (count := self._file.readinto(view[position:])):
                position += count
        if position < num_bytes:
            raise ValueError(f"it ends after {start + position} bytes")
        return content
