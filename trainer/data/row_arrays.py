"""Rows as a model computes on them, in arrays; imports no torch, so that a server of a model reads them so too."""

import numpy as np

from trainer.data.rows_manifest import RowRecipe

StoredRow = dict[str, np.ndarray]
"""Columns of a row as they are stored."""


def row_arrays(rows: list[StoredRow], recipe: RowRecipe) -> dict[str, np.ndarray]:
    """Rows as they are stored, as samples without labels; see RowSamples for columns and shapes."""
    make = {"text": _texts, "table": _table, "image": _images, "audio": _recordings}[recipe.kind]
    return make(rows, recipe)


def _texts(rows: list[StoredRow], recipe: RowRecipe) -> dict[str, np.ndarray]:
    texts = [row["input_ids"] for row in rows]
    return {
        "input_ids": padded(texts, recipe.pad_token_id or 0),
        "num_tokens": np.array([len(text) for text in texts], dtype=np.int64),
    }


def _table(rows: list[StoredRow], recipe: RowRecipe) -> dict[str, np.ndarray]:
    batch = {}
    if recipe.features:
        features = (np.stack([row["features"] for row in rows]) - recipe.means) / recipe.scales
        batch["features"] = features.astype(np.float32)
    if recipe.categories:
        batch["categories"] = np.stack([row["categories"] for row in rows]).astype(np.int64)
    return batch


def _images(rows: list[StoredRow], recipe: RowRecipe) -> dict[str, np.ndarray]:
    assert recipe.image_shape is not None, "images have a shape"
    pixels = np.stack([row["pixels"] for row in rows]).reshape(len(rows), *recipe.image_shape)
    means, scales = (np.array(of_channels)[:, None, None] for of_channels in (recipe.means, recipe.scales))
    return {"pixel_values": ((pixels - means) / scales).astype(np.float32)}


def _recordings(rows: list[StoredRow], recipe: RowRecipe) -> dict[str, np.ndarray]:
    values = np.zeros((len(rows), recipe.num_audio_samples or 0), dtype=np.float32)
    for place, row in enumerate(rows):
        sound = row["sound"]
        # Silence, which fills up, is 0 after it too.
        values[place, : len(sound)] = (sound - recipe.means[0]) / recipe.scales[0]
    return {"input_values": values}


def padded(rows: list[np.ndarray], fill: int) -> np.ndarray:
    """Rows of several lengths, filled up behind, int64 [rows, longest]."""
    filled = np.full((len(rows), max(map(len, rows), default=0)), fill, dtype=np.int64)
    for place, row in enumerate(rows):
        filled[place, : len(row)] = row
    return filled
