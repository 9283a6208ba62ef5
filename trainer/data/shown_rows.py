"""Rows as a person reads them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from trainer.config import RunConfig
from trainer.data.prepared_rows import PreparedRows
from trainer.data.row_labels import IGNORED
from trainer.data.row_store import StoredRows
from trainer.data.rows_manifest import RowRecipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_SHADES = " .:-=+*#%@"
_MAX_WIDTH = 32


@dataclass(frozen=True)
class ShownRow:
    """One training row and where it comes from.

    Attributes:
        position: global sample position since the start of the run.
        epoch: epoch that the position is in, from 0.
        index: which row of the training split it is.
        source_id: where it came from.
        label: its label in words.
        contents: its contents in words.
    """

    position: int
    epoch: int
    index: int
    source_id: str
    label: str
    contents: str


def rows_at(config: RunConfig, rows: PreparedRows, positions: np.ndarray) -> Iterator[ShownRow]:
    """The rows at global sample positions, int64 [n]."""
    from transformers import AutoTokenizer

    tokenizer = None
    if rows.tokenizer_dir is not None:
        tokenizer = AutoTokenizer.from_pretrained(rows.tokenizer_dir, trust_remote_code=False)
    stored = StoredRows(rows.folder, rows.manifest.splits["train"], verify=True)
    order = rows.order(config.seed, config.data)
    places = zip(positions.tolist(), order.epochs(positions).tolist(), order.indices(positions).tolist(), strict=True)
    for position, epoch, index in places:
        row = stored.read(index)
        label, contents = _label(row, rows.recipe, tokenizer), _contents(row, rows.recipe, tokenizer)
        yield ShownRow(position, epoch, index, stored.source_id(index), label, contents)


def _label(row: dict[str, np.ndarray], recipe: RowRecipe, tokenizer: "PreTrainedTokenizerFast | None") -> str:
    value = row["labels"]
    if recipe.label_kind == "number":
        return f"{float(value):.6g}"
    if recipe.label_kind == "class":
        return recipe.classes[int(value)]
    assert tokenizer is not None, "tags are of texts"
    tagged = [(token, tag) for token, tag in zip(row["input_ids"], value, strict=True) if tag != IGNORED]
    return ", ".join(f"{tokenizer.decode([int(token)]).strip()}: {recipe.classes[tag]}" for token, tag in tagged)


def _contents(row: dict[str, np.ndarray], recipe: RowRecipe, tokenizer: "PreTrainedTokenizerFast | None") -> str:
    if recipe.kind == "text":
        assert tokenizer is not None, "texts have one"
        text: str = tokenizer.decode(row["input_ids"].tolist())
        return text
    if recipe.kind == "table":
        parts = [f"{name}={row['features'][i]:.6g}" for i, name in enumerate(recipe.features)]
        for number, column in enumerate(recipe.categories):
            index = int(row["categories"][number])
            parts.append(f"{column.name}={column.values[index - 1] if index else '(not in training)'}")
        return ", ".join(parts)
    if recipe.kind == "image":
        return _drawn(row["pixels"], recipe)
    sound = row["sound"]
    seconds = len(sound) / (recipe.sampling_rate or 1)
    return f"{len(sound):,} samples, {seconds:.3g} s, loudest {np.abs(sound).max(initial=0.0):.3g}"


def _drawn(pixels: np.ndarray, recipe: RowRecipe) -> str:
    """An image in characters, the brighter the denser."""
    assert recipe.image_shape is not None, "images have a shape"
    grey = pixels.reshape(recipe.image_shape).mean(axis=0)
    stride = -(-grey.shape[1] // _MAX_WIDTH)
    grey = grey[::stride, ::stride]
    levels = (grey * (len(_SHADES) - 1) / max(float(grey.max()), 1.0)).round().astype(int)
    # Characters are about twice as high as wide.
    return "\n".join("".join(2 * _SHADES[level] for level in line).rstrip() for line in levels)
