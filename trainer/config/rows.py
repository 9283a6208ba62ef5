"""Configuration of samples that are rows, one for each text, image, recording or line of a table."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from sharding.strict_model import UNSET, OnlyWith, StrictModel

SampleKind = Literal["packed", "rows"]
LabelKind = Literal["class", "number", "tags"]

TASK_SAMPLES: dict[str, tuple[SampleKind, LabelKind]] = {
    "causal-lm": ("packed", "class"),
    "masked-lm": ("packed", "class"),
    "classification": ("rows", "class"),
    "sequence-classification": ("rows", "class"),
    "token-classification": ("rows", "tags"),
    "image-classification": ("rows", "class"),
    "audio-classification": ("rows", "class"),
    "regression": ("rows", "number"),
}
"""What each task by name reads, and what its labels are."""

_ROWS = OnlyWith(format="rows")
_TABLE = OnlyWith(format="rows", source="table")
_IMAGES = OnlyWith(format="rows", source="images")
_TEXTS = OnlyWith(format="rows", source=("python-stdlib", "text", "jsonl", "parquet", "csv", "hub"))
_HUB = OnlyWith(format="rows", source="hub")
_FILES = OnlyWith(format="rows", source=("text", "jsonl", "parquet", "csv", "table", "images", "audio"))

# One may stand without a list.
Several = Annotated[
    tuple[str, ...],
    BeforeValidator(lambda texts: (texts,) if isinstance(texts, str) else texts),
    Field(strict=False),
]


class SplitConfig(StrictModel):
    """How rows are divided; the share of the validation split is `data.validation_fraction`."""

    test_fraction: Annotated[
        float, OnlyWith({"data.format": "rows", "data.test_paths": UNSET, "data.hub_test_split": UNSET})
    ] = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of the rows, chosen by a hash of their contents, that is held out for the end; training never reads it."""

    stratify: Annotated[
        bool,
        OnlyWith({"data.format": "rows", "data.label_kind": "class"}),
        OnlyWith(group=UNSET, because="the rows of a group stay together whatever their class"),
    ] = False
    """Hold out the same share of each class."""

    group: Annotated[str | None, OnlyWith({"data.format": "rows"})] = None
    """Column whose equal values stay on one side of a split, such as a patient's number; `file` stands for the file
    that a row came from."""


class RowSettings(StrictModel):
    """What a row is made of."""

    label: Annotated[str, _ROWS] = "label"
    """Column that is to be predicted; of folders of files the label is the folder's name."""

    label_kind: Annotated[Literal["auto", "class", "number", "tags"], _ROWS] = "auto"
    """Whether labels are classes, numbers or, for each word, `tags`; `auto` is what the task by its name needs, and
    class for a task of your own."""

    table: Annotated[Literal["iris", "wine", "breast_cancer", "diabetes", "ratings"] | None, _TABLE] = None
    """One of scikit-learn's tables, or `ratings`, which are computed; without it `data.paths` are read."""

    features: Annotated[Several, _TABLE] = ()
    """Columns of a table that are numbers; if empty, all that hold numbers and are not named otherwise."""

    categories: Annotated[Several, _TABLE] = ()
    """Columns of a table that hold one of several values; if empty, all that hold texts and are not named otherwise."""

    missing: Annotated[Literal["error", "mean", "drop"], _TABLE] = "error"
    """What becomes of a row of a table without one of its numbers: an error, the training rows' mean in its place, or
    no row."""

    standardize: Annotated[bool, OnlyWith(format="rows", source=("table", "digits", "images", "audio", "tones"))] = True
    """Subtract the training rows' mean from numbers, pixels and sound, and divide by their standard deviation."""

    image_size: Annotated[int, _IMAGES] = Field(default=0, ge=0)
    """Height and width that images are brought to; must be set for them."""

    image_channels: Annotated[Literal[1, 3], _IMAGES] = 3
    """Channels of images: 1 is grey, 3 is colour."""

    audio_samples: Annotated[int, OnlyWith(format="rows", source=("audio", "tones"))] = Field(default=0, ge=0)
    """Samples of a recording: longer ones are cut, shorter ones filled up with silence; 0 means as many as the longest
    training one has."""

    split: SplitConfig = SplitConfig()
    """Training, validation and test."""

    validation_paths: Annotated[Several, _FILES] = ()
    """Files of the validation split, in place of a share of `data.paths`."""

    test_paths: Annotated[Several, _FILES] = ()
    """Files of the test split, in place of a share of `data.paths`."""

    hub_validation_split: Annotated[str | None, _HUB] = None
    """Split of the hub data set that is the validation split, in place of a share of `hub_split`."""

    hub_test_split: Annotated[str | None, _HUB] = None
    """Split of the hub data set that is the test split, in place of a share of `hub_split`."""

    bucket_by_length: Annotated[bool, _TEXTS] = False
    """Put texts of like length into one micro-batch; the rows of a step stay the same."""
