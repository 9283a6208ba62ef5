"""Prepared rows, as Samples."""

from collections.abc import Sequence

import numpy as np
import torch

from sharding.engine import Batch
from trainer.data.facts import SampleFacts
from trainer.data.prepared_rows import PreparedRows
from trainer.data.row_arrays import StoredRow, padded, row_arrays
from trainer.data.row_labels import IGNORED
from trainer.data.row_store import StoredRows
from trainer.data.rows_manifest import RowRecipe


class RowSamples:
    """Sample i of a split is its i-th row.

    Texts have ``input_ids`` int64 [rows, longest] and ``num_tokens`` int64 [rows]; tables ``features`` fp32 [rows,
    features] and ``categories`` int64 [rows, columns], as far as there are such; images ``pixel_values`` fp32 [rows,
    channels, height, width]; recordings ``input_values`` fp32 [rows, samples]. ``labels`` are int64 [rows], fp32 [rows]
    where they are numbers, or int64 [rows, longest] where tokens have them.
    """

    def __init__(self, prepared: PreparedRows, *, verify: bool = True) -> None:
        """Bind to prepared rows; ``verify`` is StoredRows'."""
        self._prepared = prepared
        self._recipe = prepared.recipe
        self._facts = prepared.facts()
        self._verify = verify
        self._stored: dict[str, StoredRows] = {}

    @property
    def fingerprint(self) -> str:
        """See Samples."""
        return self._prepared.fingerprint

    @property
    def facts(self) -> SampleFacts:
        """See Samples."""
        return self._facts

    def num_samples(self, split: str) -> int:
        """See Samples."""
        return self._prepared.manifest.splits[split].num_rows

    def lengths(self, indices: Sequence[int]) -> np.ndarray:
        """Tokens of training rows that are texts, int64 [rows]."""
        stored = self._rows("train")
        return np.array([stored.length(index, "input_ids") for index in indices], dtype=np.int64)

    def source_ids(self, split: str, indices: Sequence[int]) -> list[str]:
        """Where rows came from."""
        stored = self._rows(split)
        return [stored.source_id(index) for index in indices]

    def read(self, split: str, indices: Sequence[int]) -> Batch:
        """See Samples."""
        stored = self._rows(split)
        return row_batch([stored.read(index) for index in indices], self._recipe)

    def _rows(self, split: str) -> StoredRows:
        if split not in self._stored:
            facts = self._prepared.manifest.splits[split]
            self._stored[split] = StoredRows(self._prepared.folder, facts, verify=self._verify)
        return self._stored[split]


def row_batch(rows: list[StoredRow], recipe: RowRecipe) -> Batch:
    """Rows as they are stored, as samples; see RowSamples."""
    batch = {name: torch.from_numpy(column) for name, column in row_arrays(rows, recipe).items()}
    if recipe.label_kind == "tags":
        batch["labels"] = torch.from_numpy(padded([row["labels"] for row in rows], IGNORED))
    else:
        dtype = np.float32 if recipe.label_kind == "number" else np.int64
        batch["labels"] = torch.from_numpy(np.array([row["labels"] for row in rows], dtype=dtype))
    return batch
