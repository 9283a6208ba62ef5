"""Kinds of rows: how each becomes bytes that are compared and kept, and these the columns that are stored."""

import itertools
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from sharding.ranks.errors import UserError
from trainer.config.data import DataConfig
from trainer.data.row_sources import RawRow, no_column
from trainer.data.row_statistics import RunningStatistics
from trainer.data.rows_manifest import CategoryColumn, RowRecipe

if TYPE_CHECKING:
    import pyarrow as pa

_ROWS_LOOKED_AT = 1000
_ROWS_AT_ONCE = 256
_MISSING = ("", "na", "n/a", "nan", "null", "none")


@dataclass
class RowCounts:
    """What reading has done to rows.

    Attributes:
        num_dropped: rows that were left out for lacking a number.
        num_filled: numbers that were missing.
        num_truncated: texts and recordings that were too long.
    """

    num_dropped: int = 0
    num_filled: int = 0
    num_truncated: int = 0


class RowKind(Protocol):
    """What is done with one kind of rows."""

    counts: RowCounts

    def payload(self, row: RawRow) -> bytes | None:
        """What is compared and kept of a row, without its label; None where there is nothing.

        Raises:
            UserError: the row is not what it should be.
        """

    def learn(self, payloads: Iterator[bytes], recipe: RowRecipe) -> RowRecipe:
        """The recipe with what is learnt from the training rows."""

    def columns(self, payloads: list[bytes], recipe: RowRecipe) -> "dict[str, pa.Array]":
        """The columns that are stored of some rows."""


class TableRows:
    """Lines of numbers and of values."""

    def __init__(self, config: DataConfig, features: Sequence[str], categories: Sequence[str]) -> None:
        """Bind to columns.

        Args:
            config: what else is said of them.
            features: those that are numbers, in order.
            categories: those that hold one of several values, in order.
        """
        self._config = config
        self.counts = RowCounts()
        self._features = list(features)
        self._categories = list(categories)

    @classmethod
    def by_first_rows(cls, config: DataConfig, rows: Iterable[RawRow]) -> "TableRows":
        """Decide which columns are which.

        Args:
            config: which of them are named.
            rows: the first ones, which tell where no columns are named.

        Raises:
            UserError: a named column is not there, or there is none.
        """
        first = list(itertools.islice(rows, _ROWS_LOOKED_AT))
        if not first:
            return cls(config, [], [])
        for setting, names in (("data.features", config.features), ("data.categories", config.categories)):
            for name in names:
                if name not in first[0].values:
                    raise no_column(setting, name, first[0])
        named = {*config.features, *config.categories, config.label, config.split.group}
        others = [name for name in first[0].values if name not in named]
        numeric = [name for name in others if all(_is_number(row.values.get(name)) for row in first)]
        features = list(config.features) or numeric
        categories = list(config.categories) or [name for name in others if name not in numeric]
        if not features and not categories:
            raise UserError(
                f"data.features and data.categories: {first[0].place} has no column but the label; it has "
                f"{', '.join(first[0].values)}."
            )
        return cls(config, features, categories)

    def payload(self, row: RawRow) -> bytes | None:
        """See RowKind."""
        numbers = [self._number(row, name) for name in self._features]
        if any(map(math.isnan, numbers)) and self._config.missing == "drop":
            self.counts.num_dropped += 1
            return None
        values = [self._value(row, name) for name in self._categories]
        return json.dumps([numbers, values]).encode()

    def learn(self, payloads: Iterator[bytes], recipe: RowRecipe) -> RowRecipe:
        """See RowKind."""
        statistics = RunningStatistics(len(self._features))
        seen: list[set[str]] = [set() for _ in self._categories]
        for rows in _in_pieces(payloads):
            numbers, values = _unpack(rows)
            statistics.add(numbers)
            for column, of_column in zip(seen, zip(*values, strict=True), strict=False):
                column.update(of_column)
        standardized = self._config.standardize
        categories = [
            CategoryColumn(name=name, values=sort_names(column))
            for name, column in zip(self._categories, seen, strict=True)
        ]
        return recipe.model_copy(
            update={
                "features": self._features,
                "categories": categories,
                "fills": statistics.means,
                "means": statistics.means if standardized else [0.0] * len(self._features),
                "scales": statistics.scales if standardized else [1.0] * len(self._features),
            }
        )

    def columns(self, payloads: list[bytes], recipe: RowRecipe) -> "dict[str, pa.Array]":
        """See RowKind; ``features`` float64 [rows, features] and ``categories`` int32 [rows, columns]."""
        numbers, values = _unpack(payloads)
        self.counts.num_filled += int(np.isnan(numbers).sum())
        numbers = np.where(np.isnan(numbers), np.array(recipe.fills), numbers)
        table = category_indices(values, category_tables(recipe))
        widths = {"features": numbers, "categories": table}
        return {name: fixed_lists(rows) for name, rows in widths.items() if rows.shape[1]}

    def _number(self, row: RawRow, name: str) -> float:
        if name not in row.values:
            raise no_column("data.features", name, row)
        value: Any = row.values[name]
        if _is_missing(value):
            if self._config.missing == "error":
                raise UserError(
                    f"column {name} of {row.place} has no number; set data.missing to mean or drop, or mend the row."
                )
            return math.nan
        if not _is_number(value):
            raise UserError(
                f"column {name} of {row.place} is {value!r}, which is no number; name the column in data.categories, "
                "or mend the row."
            )
        return float(value)

    def _value(self, row: RawRow, name: str) -> str:
        if name not in row.values:
            raise no_column("data.categories", name, row)
        return name_of(row.values[name])


def category_tables(recipe: RowRecipe) -> list[dict[str, int]]:
    """For each categorical column the index of each value that training has seen."""
    return [{value: index for index, value in enumerate(c.values, start=1)} for c in recipe.categories]


def category_indices(values: list[list[str]], tables: list[dict[str, int]]) -> np.ndarray:
    """Values of rows as indices, int32 [rows, columns]; 0 stands for what training has not seen."""
    indices = [[table.get(value, 0) for table, value in zip(tables, row, strict=True)] for row in values]
    return np.array(indices, dtype=np.int32).reshape(len(values), len(tables))


def fixed_lists(rows: np.ndarray) -> "pa.Array":
    """Rows of equal length, [rows, width], as a column."""
    import pyarrow as pa

    return pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), rows.shape[1])


def _in_pieces(payloads: Iterator[bytes]) -> Iterator[list[bytes]]:
    while piece := list(itertools.islice(payloads, _ROWS_AT_ONCE)):
        yield piece


def _unpack(payloads: list[bytes]) -> tuple[np.ndarray, list[list[str]]]:
    rows = [json.loads(payload) for payload in payloads]
    return np.array([numbers for numbers, _ in rows], dtype=np.float64).reshape(len(rows), -1), [v for _, v in rows]


def _is_missing(value: Any) -> bool:
    if isinstance(value, str):
        return value.strip().lower() in _MISSING
    return value is None or (isinstance(value, float) and math.isnan(value))


def _is_number(value: Any) -> bool:
    if _is_missing(value):
        return True
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError):
        return False


def name_of(value: Any) -> str:
    """A value as the name of a category or class, the same from every kind of file: 1 and 1.0 are one."""
    if value is None:
        return ""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def sort_names(values: Iterable[str]) -> list[str]:
    """Values in an order of their own: of whole numbers that of their size."""
    try:
        return sorted(values, key=int)
    except ValueError:
        return sorted(values)
