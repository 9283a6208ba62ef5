"""What a request for predictions looks like, as the model's rows have it: checked, and described for OpenAPI."""

from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, WithJsonSchema, create_model

from trainer.data.rows_manifest import FILE_MAX_PIXEL, RowRecipe

MAX_NUMBER = float(np.finfo(np.float32).max)
"""Beyond it a number is infinite to a model."""

MAX_CANDIDATES = 100
_MAX_CHARACTERS = 1_000_000
_MAX_WORDS = 10_000

Number = Annotated[float, Field(ge=-MAX_NUMBER, le=MAX_NUMBER, allow_inf_nan=False)]
Text = Annotated[str, Field(min_length=1, max_length=_MAX_CHARACTERS)]


def _as_category(value: Any) -> str | int | float | bool | None:
    """A value of a column that holds one of several.

    Raises:
        ValueError: no table's line has such a one.
    """
    if value is not None and not isinstance(value, str | int | float):
        raise ValueError("a category is a text, a number, true, false or null")
    if isinstance(value, int | float) and not abs(value) <= MAX_NUMBER:
        raise ValueError("a category that is a number is finite in fp32")
    return value


Category = Annotated[
    Any, PlainValidator(_as_category), WithJsonSchema({"type": ["string", "number", "boolean", "null"]})
]
Base64 = Annotated[str, Field(min_length=1, json_schema_extra={"contentEncoding": "base64"})]


class _Form(BaseModel):
    """A part of a request; names that it does not have are refused, since they may be misspelt."""

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)


class TextRow(_Form):
    """A text."""

    text: Text


class WordsRow(_Form):
    """A text in words, each of which is given a tag."""

    words: Annotated[list[Text], Field(min_length=1, max_length=_MAX_WORDS)]


class SoundRow(_Form):
    """A recording: its samples, or a file in base64 (WAV, FLAC, OGG)."""

    samples: Annotated[list[Number] | None, Field(min_length=1)] = None
    sampling_rate: Annotated[int | None, Field(ge=1, description="Samples in a second; goes with samples.")] = None
    audio: Base64 | None = None


def row_form(recipe: RowRecipe | None) -> type[BaseModel]:
    """The form of one row.

    Args:
        recipe: how rows are read; None of texts whose tokens are masked.
    """
    if recipe is None or (recipe.kind == "text" and recipe.label_kind != "tags"):
        return TextRow
    if recipe.kind == "text":
        return WordsRow
    if recipe.kind == "audio":
        return SoundRow
    return _image_form(recipe) if recipe.kind == "image" else _table_form(recipe)


def request_form(row: type[BaseModel], max_rows: int, *, has_candidates: bool) -> type[BaseModel]:
    """The form of a whole request.

    Args:
        row: of each row.
        max_rows: the most.
        has_candidates: whether it says how many candidates are wanted for a mask.
    """
    # One made as the field's annotation is not to be a type to mypy.
    rows: Any = Annotated[list[row], Field(min_length=1, max_length=max_rows)]  # type: ignore[valid-type]
    fields: dict[str, Any] = {"rows": (rows, ...)}
    if has_candidates:
        fields["top_k"] = (Annotated[int, Field(ge=1, le=MAX_CANDIDATES, description="Candidates of each mask.")], 5)
    return create_model("PredictRequest", __base__=_Form, __doc__="Rows to predict.", **fields)


def column_field(index: int) -> str:
    """Name of the attribute that holds a column of a table, whose own name may be anything."""
    return f"column_{index}"


def _table_form(recipe: RowRecipe) -> type[BaseModel]:
    fields: dict[str, Any] = {}
    fills = recipe.missing == "mean"
    names = [*recipe.features, *(column.name for column in recipe.categories)]
    for index, name in enumerate(names):
        kind: Any = Category
        if index < len(recipe.features):
            kind = Annotated[Number | None, BeforeValidator(_missing_as_null)] if fills else Number
        fields[column_field(index)] = (kind, Field(None if fills else ..., alias=name))
    return create_model("TableRow", __base__=_Form, __doc__="A line of a table, by the names of its columns.", **fields)


def _missing_as_null(value: Any) -> Any:
    return None if isinstance(value, str) and not value.strip() else value


def _image_form(recipe: RowRecipe) -> type[BaseModel]:
    assert recipe.image_shape is not None, "images have a shape"
    shape, max_pixel = recipe.image_shape, recipe.max_pixel
    pixels = {
        "type": "array",
        "items": {},
        "description": f"{int(np.prod(shape))} whole numbers from 0 to {max_pixel} (white), one list or lists of "
        f"{' x '.join(map(str, shape))} (channels, height, width).",
        "examples": [np.zeros(shape, dtype=int).tolist()] if np.prod(shape) <= 64 else [],
    }
    kind: Any = Annotated[
        Any, PlainValidator(lambda value: _as_pixels(value, shape, max_pixel)), WithJsonSchema(pixels)
    ]
    if max_pixel != FILE_MAX_PIXEL:
        # Pixels of digits are no brightness of a file.
        return create_model("ImageRow", __base__=_Form, __doc__="An image, in pixels.", pixels=(kind, ...))
    fields: dict[str, Any] = {"pixels": (kind | None, None), "image": (Base64 | None, None)}
    return create_model("ImageRow", __base__=_Form, __doc__="An image: pixels, or a file in base64.", **fields)


def _as_pixels(value: Any, shape: tuple[int, int, int], max_pixel: int) -> np.ndarray:
    """Pixels, uint8 in the shape, of a list or lists in lists.

    Raises:
        ValueError: they are something else.
    """
    wanted = f"{int(np.prod(shape))} whole numbers from 0 to {max_pixel}, one list or {' x '.join(map(str, shape))}"
    if not isinstance(value, list):
        raise ValueError(f"pixels are {wanted}, but this is no list")
    try:
        pixels = np.array(value, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"pixels are {wanted}; these lists hold something else, or are of several lengths") from None
    if pixels.shape not in (shape, (int(np.prod(shape)),), shape[1:] if shape[0] == 1 else shape):
        raise ValueError(f"pixels are {wanted}, but these are {' x '.join(map(str, pixels.shape))}")
    if (
        not np.isfinite(pixels).all()
        or (pixels != np.floor(pixels)).any()
        or pixels.min() < 0
        or pixels.max() > max_pixel
    ):
        raise ValueError(f"pixels are {wanted}; of these some are not")
    return pixels.reshape(shape).astype(np.uint8)


class ClassPrediction(BaseModel):
    """The likeliest class, and the probability of each."""

    label: str = Field(serialization_alias="class")
    probabilities: dict[str, float]


class NumberPrediction(BaseModel):
    """A number, in the unit of the labels."""

    value: float


class WordTag(BaseModel):
    """The tag of a word; null where the model did not read that far, or the word has no token."""

    word: str
    tag: str | None
    probability: float | None


class TagsPrediction(BaseModel):
    """A tag for each word."""

    tags: list[WordTag]


class Candidate(BaseModel):
    """A token that may stand at a mask."""

    token: str
    probability: float


class MaskPrediction(BaseModel):
    """The likeliest tokens of each mask, and the text with the likeliest in place."""

    masks: list[list[Candidate]]
    text: str


class ValuesPrediction(BaseModel):
    """What the model of a task of one's own gives, as nested lists."""

    outputs: list[Any]


PREDICTIONS: dict[str, type[BaseModel]] = {
    "classes": ClassPrediction,
    "binary": ClassPrediction,
    "number": NumberPrediction,
    "tags": TagsPrediction,
    "tokens": MaskPrediction,
    "values": ValuesPrediction,
}
"""The form of a prediction by what outputs mean."""


def response_form(output_kind: str) -> type[BaseModel]:
    """The form of an answer."""
    prediction = PREDICTIONS[output_kind]
    kind: Any = list[prediction]  # type: ignore[valid-type]
    return create_model(
        "PredictResponse", __doc__="A prediction for each row, in their order.", predictions=(kind, ...)
    )


class Refusal(BaseModel):
    """Why there is no answer."""

    detail: str


Kind = Literal["text", "words", "table", "image", "audio", "mask"]
"""What rows of a model are to its users."""


def kind_of(recipe: RowRecipe | None) -> Kind:
    """What rows are to a user."""
    if recipe is None:
        return "mask"
    return "words" if recipe.kind == "text" and recipe.label_kind == "tags" else recipe.kind
