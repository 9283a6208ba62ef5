"""Labels of rows: classes, numbers, or a tag for each word."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sharding.ranks.errors import UserError
from trainer.config.data import DataConfig
from trainer.data.row_kinds import name_of, sort_names
from trainer.data.row_sources import RawRow, no_column
from trainer.data.row_splits import RowSpool
from trainer.data.row_statistics import RunningStatistics
from trainer.data.rows_manifest import RowRecipe

if TYPE_CHECKING:
    import pyarrow as pa

IGNORED = -100
"""Label of a token that has none, as ``torch.nn.functional.cross_entropy`` leaves it out."""


def label_of(row: RawRow, config: DataConfig) -> Any:
    """The label of a row: a class's name, a number, or tags.

    Raises:
        UserError: there is none, or it is of another kind.
    """
    column = config.label
    if column not in row.values:
        raise no_column("data.label", column, row)
    value = row.values[column]
    if config.label_kind == "tags":
        if not isinstance(value, list) or any(tag is None for tag in value):
            raise UserError(f"data.label={column}: {row.place} has no list of tags, one for each word; mend the row.")
        words = row.values.get(config.text_field)
        if isinstance(words, list) and len(words) != len(value):
            raise UserError(
                f"data.label={column}: {row.place} has {len(value)} tags for {len(words)} words; mend the row."
            )
        return [name_of(tag) for tag in value]
    if value is None or value == "":
        raise UserError(f"data.label={column}: {row.place} has no label; mend or remove the row.")
    return name_of(value) if config.label_kind == "class" else _number(value, column, row)


def learn_labels(spool: RowSpool, config: DataConfig, recipe: RowRecipe) -> RowRecipe:
    """The recipe with what the labels of the training rows tell.

    Raises:
        UserError: a held-out row has a class that no training row has, or training has one class alone.
    """
    training = [spool.labels[row] for row in spool.rows_of("train")]
    if recipe.label_kind == "number":
        statistics = RunningStatistics(1)
        statistics.add(np.array(training, dtype=np.float64)[:, None])
        return recipe.model_copy(update={"label_mean": statistics.means[0], "label_scale": statistics.scales[0]})
    has_tags = recipe.label_kind == "tags"
    counts = Counter(tag for tags in training for tag in tags) if has_tags else Counter(training)
    classes = sort_names(counts)
    if len(classes) < 2:
        raise UserError(
            f"data.label={config.label}: all {len(training)} training rows are of the class {', '.join(classes)}, so "
            "there is nothing to learn; name another column, or add rows of another class."
        )
    recipe = recipe.model_copy(update={"classes": classes, "class_counts": [counts[name] for name in classes]})
    check_labels(spool, ("validation", "test"), config, recipe)
    return recipe


def check_labels(spool: RowSpool, splits: Sequence[str], config: DataConfig, recipe: RowRecipe) -> None:
    """Assert that rows that are not trained on have no class but those of training.

    Raises:
        UserError: one has.
    """
    if recipe.label_kind == "number":
        return
    known = set(recipe.classes)
    for split in splits:
        for row in spool.rows_of(split):
            label = spool.labels[row]
            unseen = next(
                (name for name in (label if recipe.label_kind == "tags" else [label]) if name not in known), None
            )
            if unseen is not None:
                raise UserError(
                    f"data.label={config.label}: {spool.source_ids[row]} of the {split} split is of the class "
                    f"{unseen}, which no training row has; add such rows, set data.split.stratify=true, or remove it."
                )


def label_column(labels: list[Any], recipe: RowRecipe, columns: "dict[str, pa.Array]") -> "pa.Array":
    """Labels as they are stored: a class's index, a number, or the indices of tags, each at its word's first token."""
    import pyarrow as pa

    if recipe.label_kind == "number":
        return pa.array(labels, type=pa.float32())
    index = {name: number for number, name in enumerate(recipe.classes)}
    if recipe.label_kind == "class":
        return pa.array([index[label] for label in labels], type=pa.int32())
    rows = []
    for tags, ids, starts in zip(labels, columns["input_ids"], columns["word_starts"], strict=True):
        row = np.full(len(ids), IGNORED, dtype=np.int32)
        for tag, start in zip(tags, starts.as_py(), strict=True):
            if start >= 0:
                row[start] = index[tag]
        rows.append(row)
    return pa.array(rows, type=pa.large_list(pa.int32()))


def _number(value: Any, column: str, row: RawRow) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError(
            f"data.label={column}: {row.place} has {value!r}, which is no number; name another column, or a task that "
            "learns classes."
        )
    return number
