"""Rows of a source as mappings of columns, in source order."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sharding.ranks.errors import UserError
from trainer.config.data import DataConfig
from trainer.data.corpus import hub_rows, reading
from trainer.data.files import find_files
from trainer.data.generated import SAMPLING_RATE, generated_ratings, generated_tones
from trainer.data.python_stdlib import stdlib_passages
from trainer.data.row_files import csv_rows, decode, json_rows, open_decompressed, parquet_rows

PIXELS = "pixels"
"""Column of an image that is in memory."""

SOUND = "sound"
"""Column of a recording that is in memory: its samples, fp32, and how many there are in a second."""

PATH = "path"
"""Column of a file that holds a row of its own."""

FILE_GROUP = "file"
"""What ``data.split.group`` calls the file that a row came from."""

DIGITS_MAX_PIXEL = 16
"""Value of a white pixel of scikit-learn's digits."""


@dataclass(frozen=True)
class RawRow:
    """A row as its source has it.

    Attributes:
        values: columns.
        place: where it is, to speak of.
        source_id: a path, with ``#row`` where a file holds several.
        file: what it shares with the rows of its file.
    """

    values: dict[str, Any]
    place: str
    source_id: str
    file: str


def read_raw_rows(config: DataConfig) -> Iterator[RawRow]:
    """Every row of ``data.paths`` or ``data.hub_split``, or of a source that is neither.

    Raises:
        UserError: the source cannot be read.
    """
    rows = _read(config)
    return itertools.islice(rows, config.max_documents) if config.max_documents else rows


def group_of(row: RawRow, group: str, setting: str = "data.split.group") -> str:
    """What rows that belong together have in common.

    Raises:
        UserError: there is no such column.
    """
    if group in row.values:
        return str(row.values[group])
    if group == FILE_GROUP:
        return row.file
    raise no_column(setting, group, row)


def no_column(setting: str, column: str, row: RawRow) -> UserError:
    """What to raise where a column that a setting names is not there."""
    return UserError(
        f"{setting}={column} is not a column of {row.place}, which has {', '.join(row.values)}; name one of them."
    )


def _read(config: DataConfig) -> Iterator[RawRow]:
    if config.source == "digits":
        return _digits(config)
    if config.source == "tones":
        return _tones(config)
    if config.source == "table" and config.table is not None:
        return _ratings(config) if config.table == "ratings" else _bundled_table(config)
    if config.source == "hub":
        return _hub(config)
    if config.source == "python-stdlib":
        return _stdlib(config)
    return _local(config)


def _digits(config: DataConfig) -> Iterator[RawRow]:
    import numpy as np

    bunch = _bundled("digits")
    for number, (image, target) in enumerate(zip(bunch["data"], bunch["target"], strict=True)):
        values = {PIXELS: np.minimum(image, DIGITS_MAX_PIXEL).astype(np.uint8), config.label: int(target)}
        yield RawRow(values, f"row {number} of digits", f"digits#{number}", "digits")


def _tones(config: DataConfig) -> Iterator[RawRow]:
    for number, tone in enumerate(generated_tones()):
        values = {SOUND: (tone.sound, SAMPLING_RATE), config.label: tone.instrument}
        yield RawRow(values, f"tone {number}", f"tones#{number}", "tones")


def _ratings(config: DataConfig) -> Iterator[RawRow]:
    for number, rating in enumerate(generated_ratings()):
        values = {"user": rating.user, "item": rating.item, config.label: rating.stars}
        yield RawRow(values, f"row {number} of ratings", f"ratings#{number}", "ratings")


def _bundled_table(config: DataConfig) -> Iterator[RawRow]:
    assert config.table is not None, "the caller has seen it"
    bunch = _bundled(config.table)
    names = [str(name) for name in bunch["feature_names"]]
    classes = bunch.get("target_names")
    for number, (features, target) in enumerate(zip(bunch["data"].tolist(), bunch["target"].tolist(), strict=True)):
        label = target if classes is None else str(classes[int(target)])
        values = dict(zip(names, features, strict=True)) | {config.label: label}
        yield RawRow(values, f"row {number} of {config.table}", f"{config.table}#{number}", config.table)


def _bundled(name: str) -> Any:
    from sklearn import datasets

    return datasets.load_diabetes(scaled=False) if name == "diabetes" else getattr(datasets, f"load_{name}")()


def _hub(config: DataConfig) -> Iterator[RawRow]:
    name = str(config.hub_name)
    with reading(config, name):
        rows = hub_rows(config)
        # What a number stands for, where the data set says so.
        classes = getattr((rows.features or {}).get(config.label), "names", None)
        for number, row in enumerate(rows):
            label = row.get(config.label)
            if classes is not None and isinstance(label, int):
                # -1 stands for a label that is kept secret.
                row = row | {config.label: classes[label] if label >= 0 else None}
            yield RawRow(row, f"row {number} of {name}", f"{name}#{number}", name)


def _stdlib(config: DataConfig) -> Iterator[RawRow]:
    for passage in stdlib_passages():
        values = {config.text_field: passage.text, config.label: passage.package}
        yield RawRow(values, passage.source_id, passage.source_id, passage.file)


def _local(config: DataConfig) -> Iterator[RawRow]:
    for path in find_files(config).files:
        with reading(config, str(path)):
            yield from _of_file(config, path)


def _of_file(config: DataConfig, path: Path) -> Iterator[RawRow]:
    if config.source in ("text", "images", "audio"):
        values: dict[str, Any] = {PATH: path, config.label: path.parent.name}
        if config.source == "text":
            with open_decompressed(path) as file:
                values[config.text_field] = decode(file.read(), path, 1)
        yield RawRow(values, str(path), str(path), str(path))
        return
    rows: Iterator[tuple[str, dict[str, Any]]]
    if config.source == "jsonl":
        rows = json_rows(path)
    elif config.source == "parquet" or ".parquet" in path.suffixes:
        rows = parquet_rows(path)
    else:
        rows = csv_rows(path)
    for number, (place, row) in enumerate(rows):
        yield RawRow(row, place, f"{path}#{number}", str(path))
