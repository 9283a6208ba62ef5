"""What prepared rows say of themselves: how a row is read, and which files hold them; imports no torch."""

from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from sharding.ranks.errors import UserError
from sharding.strict_model import StrictRecord
from trainer.data.blocks import BLOCK_BYTES, HASH_BYTES
from trainer.data.contents_keys import KEY_BYTES
from trainer.data.shards import FileFacts

SPLITS = ("train", "validation", "test")
RECIPE_NAME = "rows.json"
"""File of a checkpoint or an export that says how rows are read."""
FILE_MAX_PIXEL = 255
"""Value of a white pixel of an image file, whose channels have 8 bits."""

TextForm = Literal["none", "NFC", "NFKC"]
"""Unicode form that texts are brought to, as ``data.normalize`` says."""


class CategoryColumn(StrictRecord):
    """A column that holds one of several values."""

    name: str
    """Name of the column."""

    values: list[str]
    """Values of the training rows in order; the first has index 1, and 0 stands for all others."""


class RowRecipe(StrictRecord):
    """How a row of a source becomes numbers: all that was learnt from the training rows, and kept with the model."""

    kind: Literal["text", "table", "image", "audio"]
    """What a row is."""

    label_kind: Literal["class", "number", "tags"]
    """What a label is."""

    classes: list[str] = []
    """Names of classes or tags in the order of their indices."""

    class_counts: list[int] = []
    """Training rows of each class; of tags, tokens."""

    label_mean: float | None = None
    """Mean of the training rows' numbers that are to be predicted."""

    label_scale: float | None = None
    """Their standard deviation, 1 where they are all alike."""

    features: list[str] = []
    """Columns that are numbers, in order."""

    categories: list[CategoryColumn] = []
    """Columns that hold one of several values, in order."""

    fills: list[float] = []
    """What stands where a feature is missing: the training rows' mean."""

    means: list[float] = []
    """What is subtracted from each feature, each channel of an image, or from sound."""

    scales: list[float] = []
    """What each is divided by after that."""

    image_shape: tuple[int, int, int] | None = Field(default=None, strict=False)
    """Channels, height and width of an image."""

    max_pixel: int = FILE_MAX_PIXEL
    """Value of a white pixel before ``means`` and ``scales``: 255 where images were read from files, 16 of digits."""

    num_audio_samples: int | None = None
    """Samples of a recording as a model gets it."""

    sampling_rate: int | None = None
    """Samples of a recording in a second."""

    sequence_length: int | None = None
    """The most tokens of a text; of a longer one the beginning is read."""

    vocab_size: int | None = None
    """Largest token id of the tokenizer and one."""

    eos_token_id: int | None = None
    """Token that ends each text."""

    pad_token_id: int | None = None
    """Token that fills up shorter texts."""

    mask_token_id: int | None = None
    """Token that hides another one."""

    tokenizer_sha256: str | None = None
    """Fingerprint of the tokenizer."""

    normalize: TextForm | None = None
    """Unicode form that texts were brought to; written into exports, where no configuration says it."""

    missing: Literal["error", "mean", "drop"] | None = None
    """What became of a row without one of its numbers; written into exports, as ``normalize`` is."""


def read_recipe(file: Any) -> RowRecipe:
    """How rows are read, by a file that lies beside a model: a path of this machine or of a bucket.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return RowRecipe.model_validate_json(file.read_bytes())
    except (OSError, ValidationError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{file} cannot be read ({reason}); export the run once more, or restore it.") from None


class RowSplitFacts(StrictRecord):
    """One split of prepared rows."""

    num_rows: int
    """Rows."""

    batch_rows: int = Field(ge=1)
    """Rows of a record batch of the Arrow file; the last may have fewer."""

    batch_offsets: list[int]
    """Where each record batch begins in the file, and where the last one ends."""

    rows: FileFacts
    """The Arrow file."""

    blocks: FileFacts
    """SHA-256 of each block of it, see ``trainer.data.blocks``."""

    keys: FileFacts
    """The beginning of the SHA-256 of each row's contents, by which the same row is known in another split."""

    contents_sha256: str
    """SHA-256 of the keys and labels of all rows in order; where they came from does not count."""

    num_leaked: int = 0
    """Rows that were dropped, since another split has the same."""

    num_truncated: int = 0
    """Texts that were longer than ``data.sequence_length``, or recordings longer than ``data.audio_samples``."""

    @property
    def files(self) -> list[FileFacts]:
        """All files."""
        return [self.rows, self.blocks, self.keys]

    @model_validator(mode="after")
    def _sizes_agree(self) -> Self:
        if self.blocks.num_bytes != -(-self.rows.num_bytes // BLOCK_BYTES) * HASH_BYTES:
            raise ValueError(f"{self.blocks.file} does not have a hash for each block of {self.rows.file}")
        if len(self.batch_offsets) != -(-self.num_rows // self.batch_rows) + 1:
            raise ValueError(f"{self.rows.file} does not have record batches for {self.num_rows} rows")
        if self.keys.num_bytes != self.num_rows * KEY_BYTES:
            raise ValueError(f"{self.keys.file} does not have a key for each of {self.num_rows} rows")
        return self


class RowsManifest(StrictRecord):
    """What a folder of prepared rows says of itself."""

    preparation_version: int
    """Version of this layout and of the rules of reading."""

    recipe: RowRecipe
    """How a row is read."""

    python_version: str
    """Interpreter that prepared it."""

    num_rows_read: int
    """Rows in the source."""

    num_empty: int = 0
    """Of these, dropped for being empty."""

    num_dropped: int = 0
    """Of these, dropped for lacking a number."""

    num_filled: int = 0
    """Numbers that were missing, and are the training rows' mean now."""

    tokenizer_files: list[FileFacts] = []
    """The tokenizer, its files named from the folder."""

    splits: dict[str, RowSplitFacts]
    """`train`, `validation` and `test`."""

    @model_validator(mode="after")
    def _has_all_splits(self) -> Self:
        if tuple(self.splits) != SPLITS:
            raise ValueError(f"its splits are {', '.join(self.splits)}")
        return self
