"""Rows of requests as training would store them: by the recipe, and with the functions that read its own rows."""

import base64
import binascii
import io
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sharding.ranks.errors import UserError
from trainer.data.clean import encode_text
from trainer.data.row_arrays import StoredRow, row_arrays
from trainer.data.row_encoder import RowEncoder
from trainer.data.row_kinds import category_indices, category_tables, name_of
from trainer.data.row_media import image_bytes, one_channel
from trainer.data.rows_manifest import RowRecipe
from trainer.data.tokenizer import stored_encoder
from trainer.serving.options import RequestFault
from trainer.serving.row_forms import column_field

Arrays = dict[str, np.ndarray]

_MAX_IMAGE_PIXELS = 50_000_000
_MAX_SOUND_SAMPLES = 50_000_000
DEFAULT_NORMALIZE = "NFC"
"""Unicode form of texts where a model does not say: the default of ``data.normalize``."""


class RowReader(ABC):
    """Reads rows of one kind."""

    @abstractmethod
    def store(self, rows: Sequence[Any]) -> list[StoredRow]:
        """Rows, in their form, as training would store them.

        Raises:
            RequestFault: a row cannot be read.
        """

    @abstractmethod
    def arrays(self, rows: list[StoredRow]) -> Arrays:
        """Stored rows as the model computes on them."""


class RecipeReader(RowReader):
    """Reads rows by a recipe."""

    def __init__(self, recipe: RowRecipe) -> None:
        """Bind to the recipe."""
        self.recipe = recipe

    def arrays(self, rows: list[StoredRow]) -> Arrays:
        """See RowReader."""
        return row_arrays(rows, self.recipe)


class SingleRowReader(RecipeReader):
    """Reads rows by a recipe, one after the other."""

    def store(self, rows: Sequence[Any]) -> list[StoredRow]:
        """See RowReader."""
        stored = []
        for index, row in enumerate(rows):
            try:
                stored.append(self._store(row))
            except RequestFault as fault:
                raise fault.at_row(index) from None
        return stored

    @abstractmethod
    def _store(self, row: Any) -> StoredRow:
        """One row.

        Raises:
            RequestFault: it cannot be read.
        """


class TableReader(SingleRowReader):
    """Lines of a table."""

    def __init__(self, recipe: RowRecipe) -> None:
        """See RecipeReader."""
        super().__init__(recipe)
        self._tables = category_tables(recipe)

    def _store(self, row: Any) -> StoredRow:
        num_features = len(self.recipe.features)
        given = [getattr(row, column_field(index)) for index in range(num_features + len(self._tables))]
        numbers = np.array([np.nan if value is None else value for value in given[:num_features]], dtype=np.float64)
        stored: StoredRow = {}
        if num_features:
            stored["features"] = np.where(np.isnan(numbers), np.array(self.recipe.fills), numbers)
        if self._tables:
            stored["categories"] = category_indices([[name_of(v) for v in given[num_features:]]], self._tables)[0]
        return stored


class TextReader(RecipeReader):
    """Texts, or lists of words."""

    def __init__(self, recipe: RowRecipe, folder: Path) -> None:
        """Load the tokenizer.

        Args:
            recipe: how texts are read.
            folder: where the tokenizer is.

        Raises:
            UserError: there is none.
        """
        super().__init__(recipe)
        self._has_tags = recipe.label_kind == "tags"
        self._encoder = RowEncoder(load_stored(folder)[0], has_tags=self._has_tags)
        self._normalize = recipe.normalize or DEFAULT_NORMALIZE

    def store(self, rows: Sequence[Any]) -> list[StoredRow]:
        """See RowReader; of words also ``word_starts``."""
        texts = [self._clean(row, index) for index, row in enumerate(rows)]
        stored: list[StoredRow] = []
        for index, encoded in enumerate(self._encoder.encode(texts, self.recipe.sequence_length)):
            if not encoded.ids:
                raise RequestFault(422, f"row {index}: the tokenizer finds no token in this text")
            row = {"input_ids": np.array(encoded.ids, dtype=np.int32)}
            if self._has_tags:
                row["word_starts"] = np.array(encoded.word_starts, dtype=np.int32)
            stored.append(row)
        return stored

    def _clean(self, row: Any, index: int) -> str | list[str]:
        if self._has_tags:
            return [encode_text(word, self._normalize).decode() for word in row.words]
        text = encode_text(row.text, self._normalize).decode()
        if not text.strip():
            raise RequestFault(422, f"row {index}: the text is empty")
        return text

    def arrays(self, rows: list[StoredRow]) -> Arrays:
        """See RowReader; with ``attention_mask``, 0 at padding."""
        arrays = super().arrays(rows)
        is_token = np.arange(arrays["input_ids"].shape[1]) < arrays.pop("num_tokens")[:, None]
        return arrays | {"attention_mask": is_token.astype(np.int64)}


class ImageReader(SingleRowReader):
    """Images."""

    def _store(self, row: Any) -> StoredRow:
        pixels, image = row.pixels, getattr(row, "image", None)
        if (pixels is None) == (image is None):
            raise RequestFault(422, "give pixels or an image, one of both")
        if pixels is None:
            pixels = np.frombuffer(self._decoded(from_base64(str(image))), dtype=np.uint8)
        return {"pixels": pixels.reshape(-1)}

    def _decoded(self, contents: bytes) -> bytes:
        try:
            from PIL import Image
        except ImportError:
            raise RequestFault(501, "this server has no pillow to read image files by; send pixels") from None
        assert self.recipe.image_shape is not None, "images have a shape"
        try:
            with Image.open(io.BytesIO(contents)) as image:
                if image.width * image.height > _MAX_IMAGE_PIXELS:
                    raise RequestFault(413, f"the image has more than {_MAX_IMAGE_PIXELS:,} pixels; make it smaller")
                return image_bytes(image, self.recipe.image_shape)
        except RequestFault:
            raise
        except Exception as error:  # noqa: BLE001 - a broken file makes its decoder raise anything
            raise RequestFault(422, f"this cannot be read as an image ({type(error).__name__})") from None


class SoundReader(SingleRowReader):
    """Recordings."""

    def _store(self, row: Any) -> StoredRow:
        if (row.samples is None) == (row.audio is None):
            raise RequestFault(422, "give samples or audio, one of both")
        if row.samples is not None:
            sound, rate = np.array(row.samples, dtype=np.float32), row.sampling_rate
        else:
            sound, rate = self._decoded(from_base64(row.audio))
        wanted = self.recipe.sampling_rate
        if rate != wanted:
            has = "has no sampling_rate" if rate is None else f"has {rate} samples a second"
            raise RequestFault(422, f"the recording {has}, and the model has learnt {wanted}; bring it to that rate")
        if not len(sound) or not np.isfinite(sound).all():
            raise RequestFault(422, "the recording is empty or has samples that are no finite numbers")
        return {"sound": sound[: self.recipe.num_audio_samples]}

    def _decoded(self, contents: bytes) -> tuple[np.ndarray, int]:
        try:
            import soundfile
        except ImportError:
            raise RequestFault(501, "this server has no soundfile to read recordings by; send samples") from None
        try:
            with soundfile.SoundFile(io.BytesIO(contents)) as file:
                if file.frames * file.channels > _MAX_SOUND_SAMPLES:
                    raise RequestFault(413, f"the recording has more than {_MAX_SOUND_SAMPLES:,} samples; shorten it")
                # Of a longer one no more is computed with, and a small file may unpack to hundreds of megabytes.
                read = file.read(self.recipe.num_audio_samples or -1, dtype="float32", always_2d=True)
                return one_channel(read), file.samplerate
        except RequestFault:
            raise
        except Exception as error:  # noqa: BLE001 - a broken file makes its decoder raise anything
            raise RequestFault(422, f"this cannot be read as a recording ({type(error).__name__})") from None


def recipe_reader(recipe: RowRecipe, folder: Path) -> RecipeReader:
    """What reads rows of a recipe.

    Args:
        recipe: how they are read.
        folder: where the tokenizer is, if there is one.

    Raises:
        UserError: there is no tokenizer, and one is needed.
    """
    if recipe.kind == "text":
        return TextReader(recipe, folder)
    readers: dict[str, Callable[[RowRecipe], SingleRowReader]] = {
        "table": TableReader,
        "image": ImageReader,
        "audio": SoundReader,
    }
    return readers[recipe.kind](recipe)


def load_stored(folder: Path) -> Any:
    """See ``trainer.data.tokenizer.stored_encoder``.

    Raises:
        UserError: there is no tokenizer in the folder.
    """
    try:
        return stored_encoder(folder)
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        raise UserError(f"{folder} has no tokenizer that can be read ({error}); export the run once more.") from None


def from_base64(text: str) -> bytes:
    """The bytes of a file.

    Raises:
        RequestFault: it is no base64.
    """
    # As a browser writes a file's contents into a URL.
    _, _, data = text.rpartition(",")
    try:
        return base64.b64decode(data, validate=True)
    except (ValueError, binascii.Error):
        raise RequestFault(422, "the file is not written in base64") from None
