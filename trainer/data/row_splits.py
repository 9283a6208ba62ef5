"""Rows on their way into splits: kept in a file, divided by hashes, and never the same in two splits."""

import hashlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from sharding.ranks.errors import UserError
from trainer.config.data import DataConfig
from trainer.config.rows_rules import held_out_fraction
from trainer.data.clean import hash_position
from trainer.data.contents_keys import KEY_BYTES, shared_keys
from trainer.data.rows_manifest import SPLITS

_SPOOL_NAME = "rows.spool"


class RowSpool:
    """Rows of a source, their payloads in a file; memory holds some 100 bytes of each."""

    def __init__(self, folder: Path) -> None:
        """Begin a file in a folder."""
        self._path = folder / _SPOOL_NAME
        self._file: BinaryIO = self._path.open("wb")
        self._lengths: list[int] = []
        self._keys: list[bytes] = []
        self._positions: list[float] = []
        self._splits: list[str | None] = []
        self.labels: list[Any] = []
        self.source_ids: list[str] = []
        self.num_bytes = 0
        self.num_leaked = dict.fromkeys(SPLITS, 0)

    def add(
        self, payload: bytes, label: Any, source_id: str, group: str | None, split: str | None, *, with_label: bool
    ) -> None:
        """Take in a row.

        Args:
            payload: its contents without its label.
            label: its label.
            with_label: whether two rows of other labels are two rows, though their contents are the same.
            source_id: where it came from.
            group: what it shares with rows that must be on its side of a split; None where rows are divided one by one.
            split: where it belongs, if its file says so.
        """
        key = hashlib.sha256(payload + str(label).encode() if with_label else payload).digest()
        self._file.write(payload)
        self._lengths.append(len(payload))
        self._keys.append(key[:KEY_BYTES])
        self._positions.append(hash_position(key if group is None else hashlib.sha256(group.encode()).digest()))
        self._splits.append(split)
        self.labels.append(label)
        self.source_ids.append(source_id)
        self.num_bytes += len(payload)

    def __enter__(self) -> Self:
        """Take in rows, and give them back."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Delete the file."""
        self._file.close()
        self._path.unlink(missing_ok=True)

    @property
    def num_rows(self) -> int:
        """Rows that were taken in."""
        return len(self._lengths)

    def divide(self, config: DataConfig) -> None:
        """Give every row a split, and drop from validation and test what another split has as well.

        Where a row falls follows from its own contents, or its group's; with ``stratify`` from its class's others too.

        Raises:
            UserError: a split that was asked for has no row.
        """
        self._file.close()
        free = [row for row, split in enumerate(self._splits) if split is None]
        shares = (held_out_fraction(config), config.split.test_fraction)
        parts = [free]
        if config.split.stratify:
            by_class: dict[str, list[int]] = {}
            for row in free:
                by_class.setdefault(str(self.labels[row]), []).append(row)
            parts = list(by_class.values())
        for rows in parts:
            divide = _by_rank if config.split.stratify else _by_position
            for row, split in zip(rows, divide([self._positions[row] for row in rows], *shares), strict=True):
                self._splits[row] = split
        self._drop_leaks()
        self._check_splits(config)

    def put_all_into(self, split: str, trained: bytes) -> None:
        """Give every row the same split, but for those that are among the rows that were trained on.

        Args:
            split: the split.
            trained: keys of these rows, one behind the other; empty where they are not known.

        Raises:
            UserError: there is no row.
        """
        self._file.close()
        known = shared_keys(b"".join(self._keys), trained)
        self._splits = [None if key in known else split for key in self._keys]
        self.num_leaked[split] = num_leaked = self._splits.count(None)
        if num_leaked == len(self._splits):
            leaked = f", {num_leaked} of which are among those that are trained on" if num_leaked else ""
            raise UserError(f"data.paths: there is no row ({self.num_rows} rows read{leaked}); name other files.")

    def keys(self, rows: Sequence[int]) -> bytes:
        """Keys of some rows, one behind the other."""
        return b"".join(self._keys[row] for row in rows)

    def rows_of(self, split: str) -> list[int]:
        """The rows of a split by number, in the order of the source."""
        return [row for row, of_row in enumerate(self._splits) if of_row == split]

    def payloads(self, rows: Sequence[int]) -> Iterator[bytes]:
        """Payloads of some rows, given in order."""
        with self._path.open("rb") as file:
            place, next_row = 0, 0
            for row in rows:
                place += sum(self._lengths[next_row:row])
                file.seek(place)
                yield file.read(self._lengths[row])
                place, next_row = place + self._lengths[row], row + 1

    def _drop_leaks(self) -> None:
        elsewhere: set[bytes] = set()
        # What training has seen is no test, and what the test is to tell is not to be chosen by.
        for split in ("train", "test", "validation"):
            rows = self.rows_of(split)
            leaked = [row for row in rows if self._keys[row] in elsewhere]
            for row in leaked:
                self._splits[row] = None
            self.num_leaked[split] = len(leaked)
            elsewhere.update(self._keys[row] for row in rows)

    def _check_splits(self, config: DataConfig) -> None:
        test_fraction = config.split.test_fraction
        fractions = {
            "validation": f"data.validation_fraction={config.validation_fraction:g}",
            "test": f"data.split.test_fraction={test_fraction:g}",
        }
        named = {
            "validation": config.validation_paths or config.hub_validation_split,
            "test": config.test_paths or config.hub_test_split,
        }
        is_wanted = {
            "train": True,
            "validation": bool(named["validation"] or config.validation_fraction),
            "test": bool(named["test"] or test_fraction),
        }
        for split in SPLITS:
            if is_wanted[split] and not self.rows_of(split):
                setting = "data.paths" if split == "train" else fractions[split]
                if named.get(split):
                    setting = f"data.{split}_paths" if config.source != "hub" else f"data.hub_{split}_split"
                num_leaked = self.num_leaked[split]
                leaked = f", {num_leaked} of its rows being in another split too" if num_leaked else ""
                raise UserError(
                    f"{setting}: the {split} split is empty ({self.num_rows} rows read{leaked}); name other files or "
                    "shares, or check data.text_field and data.max_documents."
                )


def _by_position(positions: list[float], validation: float, test: float) -> list[str]:
    """Splits by shares of all hashes: the lowest are validation, the highest test."""
    distinct = sorted(set(positions))
    low, high = validation, 1.0 - test
    # Of two or more, one is held out and one is left, however small the share.
    if validation > 0 and len(distinct) > 1:
        low = min(max(low, math.nextafter(distinct[0], 1.0)), distinct[-1])
    if test > 0 and len(distinct) > 2:
        high = max(min(high, distinct[-1]), distinct[2 if validation > 0 else 1])
        low = min(low, distinct[-2])
    return ["validation" if p < low else "test" if test > 0 and p >= high else "train" for p in positions]


def _by_rank(positions: list[float], validation: float, test: float) -> list[str]:
    """Splits by shares of these rows, as near as whole rows come."""
    splits = ["train"] * len(positions)
    order = sorted(range(len(positions)), key=positions.__getitem__)
    for row in order[: round(len(order) * validation)]:
        splits[row] = "validation"
    for row in order[len(order) - round(len(order) * test) :]:
        splits[row] = "test"
    return splits
