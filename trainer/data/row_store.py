"""Files of rows: an Arrow file that is mapped, written batch by batch and compared where it is read."""

import hashlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sharding.ranks.errors import UserError
from trainer.data.blocks import BlockCheck, hash_blocks
from trainer.data.pack import describe_file, write_file
from trainer.data.rows_manifest import RowSplitFacts

if TYPE_CHECKING:
    import pyarrow as pa

# A row is found in its record batch; batches of about this size are compared with their hashes in no time.
_BATCH_BYTES = 2**20
_MAX_BATCH_ROWS = 4096
_OPEN_BATCHES = 256


class ListColumn:
    """A column whose rows are arrays of several lengths."""

    def __init__(self, values: np.ndarray, offsets: np.ndarray) -> None:
        """Bind to the values of all rows, and where each begins."""
        self._values = values
        self._offsets = offsets

    def __getitem__(self, row: int) -> np.ndarray:
        """One row."""
        return self._values[self._offsets[row] : self._offsets[row + 1]]

    def length(self, row: int) -> int:
        """How long a row is."""
        return int(self._offsets[row + 1] - self._offsets[row])


Columns = dict[str, ListColumn | np.ndarray]
"""Columns of a record batch, found by row."""


def batch_rows(num_rows: int, num_bytes: int) -> int:
    """Rows of a record batch, for so many rows that have so many bytes together."""
    return max(1, min(_MAX_BATCH_ROWS, _BATCH_BYTES * num_rows // max(num_bytes, 1)))


def write_rows(
    folder: Path, name: str, batches: "Iterator[pa.RecordBatch]", rows_of_batch: int, keys: bytes, labels: bytes
) -> RowSplitFacts:
    """Write one split; every batch but the last has as many rows.

    Args:
        folder: where the files go.
        name: the split.
        batches: its rows.
        rows_of_batch: rows of a whole batch.
        keys: of its rows, one behind the other.
        labels: of its rows, in any form.
    """
    import pyarrow as pa

    path = folder / f"{name}.arrow"
    offsets: list[int] = [0]
    num_rows = 0
    with pa.OSFile(str(path), "wb") as file:
        writer: Any = None
        for batch in batches:
            if writer is None:
                writer = pa.ipc.new_file(file, batch.schema)
            writer.write_batch(batch)
            num_rows += batch.num_rows
            offsets.append(file.tell())
        if writer is not None:
            writer.close()
    blocks = hash_blocks(np.memmap(path, dtype=np.uint8).data) if path.stat().st_size else b""
    return RowSplitFacts(
        num_rows=num_rows,
        batch_rows=rows_of_batch,
        batch_offsets=offsets,
        rows=describe_file(path, folder),
        blocks=write_file(folder / f"{name}-blocks.sha256", blocks),
        keys=write_file(folder / f"{name}-keys.bin", keys),
        contents_sha256=hashlib.sha256(keys + labels).hexdigest(),
    )


class StoredRows:
    """The rows of one split."""

    def __init__(self, folder: Path, facts: RowSplitFacts, *, verify: bool) -> None:
        """Map the file.

        Args:
            folder: where the files are.
            facts: what they are.
            verify: compare what is read with its hash, each block once.

        Raises:
            UserError: what is compared has changed.
        """
        import pyarrow as pa

        self._folder = folder
        self._facts = facts
        path = folder / facts.rows.file
        self._check: BlockCheck | None = None
        if verify and facts.num_rows:
            hashes = folder / facts.blocks.file
            self._check = BlockCheck(hashes.read_bytes, [np.memmap(path, dtype=np.uint8, mode="r")], self._refuse)
            # The format keeps behind the last batch where each is.
            self._check.compare(0, facts.batch_offsets[-1], facts.rows.num_bytes)
        self._reader = pa.ipc.open_file(pa.memory_map(str(path))) if facts.num_rows else None
        self._columns = lru_cache(_OPEN_BATCHES)(self._read_columns)

    @property
    def num_rows(self) -> int:
        """Rows of the split."""
        return self._facts.num_rows

    def read(self, index: int) -> dict[str, np.ndarray]:
        """The columns of a row.

        Raises:
            UserError: it is not as it was prepared.
        """
        batch, row = divmod(index, self._facts.batch_rows)
        return {name: column[row] for name, column in self._columns(batch).items()}

    def length(self, index: int, column: str) -> int:
        """How long a row is in a column whose rows have several lengths."""
        batch, row = divmod(index, self._facts.batch_rows)
        values = self._columns(batch)[column]
        assert isinstance(values, ListColumn), "its rows have several lengths"
        return values.length(row)

    def source_id(self, index: int) -> str:
        """Where a row came from."""
        batch, row = divmod(index, self._facts.batch_rows)
        assert self._reader is not None, "there is a row"
        source_id: str = self._reader.get_batch(batch).column("source_id")[row].as_py()
        return source_id

    def _read_columns(self, batch: int) -> Columns:
        if self._check is not None:
            self._check.compare(0, self._facts.batch_offsets[batch], self._facts.batch_offsets[batch + 1])
        assert self._reader is not None, "there is a row"
        table = self._reader.get_batch(batch)
        names = [name for name in table.schema.names if name != "source_id"]
        return {name: _without_copy(table.column(name)) for name in names}

    def _refuse(self, _file: int, start: int, stop: int) -> None:
        raise UserError(
            f"prepared rows {self._folder} are corrupt: bytes {start} to {stop} of {self._facts.rows.file} have "
            "changed; delete the folder, and the same command prepares it again."
        )


def _without_copy(column: Any) -> ListColumn | np.ndarray:
    """A column without copying it."""
    import pyarrow as pa

    if pa.types.is_fixed_size_list(column.type):
        flat: np.ndarray = column.flatten().to_numpy(zero_copy_only=True)
        return flat.reshape(len(column), -1)
    if pa.types.is_large_list(column.type):
        offsets = column.offsets.to_numpy()
        return ListColumn(column.flatten().to_numpy(zero_copy_only=True), offsets - offsets[0])
    values: np.ndarray = column.to_numpy(zero_copy_only=True)
    return values
