"""Images and recordings as rows."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sharding.ranks.errors import UserError
from trainer.config.data import DataConfig
from trainer.data.row_kinds import RowCounts, fixed_lists
from trainer.data.row_sources import DIGITS_MAX_PIXEL, PATH, PIXELS, SOUND, RawRow
from trainer.data.row_statistics import RunningStatistics
from trainer.data.rows_manifest import FILE_MAX_PIXEL, RowRecipe

if TYPE_CHECKING:
    import pyarrow as pa
    from PIL import Image

_DIGITS_SHAPE = (1, 8, 8)


class ImageRows:
    """Images of one size, a byte for each channel of a pixel."""

    def __init__(self, config: DataConfig) -> None:
        """Fix the size."""
        self.counts = RowCounts()
        size = config.image_size
        is_digits = config.source == "digits"
        self._shape = _DIGITS_SHAPE if is_digits else (config.image_channels, size, size)
        self._max_pixel = DIGITS_MAX_PIXEL if is_digits else FILE_MAX_PIXEL
        self._standardize = config.standardize

    def payload(self, row: RawRow) -> bytes | None:
        """See RowKind.

        Raises:
            UserError: the image cannot be read.
        """
        if PIXELS in row.values:
            pixels: np.ndarray = row.values[PIXELS]
            return pixels.tobytes()
        return self._read(row)

    def _read(self, row: RawRow) -> bytes:
        try:
            from PIL import Image
        except ImportError:
            raise UserError(
                "data.source=images needs pillow, which is not installed; install it with pip install "
                "'shardline[tasks]'."
            ) from None
        try:
            with Image.open(row.values[PATH]) as image:
                return image_bytes(image, self._shape)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise UserError(
                f"data.paths: {row.values[PATH]} cannot be read as an image ({error}); mend or remove it."
            ) from None

    def learn(self, payloads: Iterator[bytes], recipe: RowRecipe) -> RowRecipe:
        """See RowKind."""
        channels = self._shape[0]
        statistics = RunningStatistics(channels)
        for payload in payloads:
            statistics.add(np.frombuffer(payload, dtype=np.uint8).reshape(channels, -1).T.astype(np.float64))
        means = statistics.means if self._standardize else [0.0] * channels
        # Without it pixels go from 0 to 1, as models that were trained elsewhere expect.
        scales = statistics.scales if self._standardize else [255.0] * channels
        learnt = {"image_shape": self._shape, "max_pixel": self._max_pixel, "means": means, "scales": scales}
        return recipe.model_copy(update=learnt)

    def columns(self, payloads: list[bytes], recipe: RowRecipe) -> "dict[str, pa.Array]":
        """See RowKind; ``pixels`` uint8 [rows, channels x height x width]."""
        return {"pixels": fixed_lists(np.frombuffer(b"".join(payloads), dtype=np.uint8).reshape(len(payloads), -1))}


def image_bytes(image: "Image.Image", shape: tuple[int, int, int]) -> bytes:
    """An image brought to channels, height and width, a byte for each channel of a pixel.

    Raises:
        ValueError: its channels have more than 8 bits.
        OSError: it cannot be decoded.
    """
    channels, height, width = shape
    if image.mode.startswith(("I", "F")):
        # Brought to 8 bits, all that is brighter would be the same white.
        raise ValueError(f"its mode is {image.mode}, which has more than 8 bits a channel")
    resized = image.convert("L" if channels == 1 else "RGB").resize((width, height))
    return np.asarray(resized, dtype=np.uint8).reshape(height, width, channels).transpose(2, 0, 1).tobytes()


def one_channel(channels: np.ndarray) -> np.ndarray:
    """The mean of a recording's channels, fp32 [samples] of [samples, channels]."""
    mono: np.ndarray = channels.mean(axis=1, dtype=np.float32)
    return mono


class AudioRows:
    """Recordings of one rate, of one channel, as fp32 numbers between -1 and 1."""

    def __init__(self, config: DataConfig, sampling_rate: int = 0) -> None:
        """Nothing is known of the recordings yet but, of a recipe, their rate; 0 takes that of the first one."""
        self.counts = RowCounts()
        self._num_samples = config.audio_samples
        self._standardize = config.standardize
        self._sampling_rate = sampling_rate

    def payload(self, row: RawRow) -> bytes | None:
        """See RowKind.

        Raises:
            UserError: the recording cannot be read, or has another sampling rate than the first one.
        """
        path = row.values.get(PATH, row.place)
        sound, rate = row.values[SOUND] if SOUND in row.values else self._read(path)
        self._sampling_rate = self._sampling_rate or rate
        if rate != self._sampling_rate:
            raise UserError(
                f"data.paths: {path} has {rate} samples a second, but the others have {self._sampling_rate}; bring "
                "all to one rate."
            )
        return sound.tobytes() or None

    def _read(self, path: Path) -> tuple[np.ndarray, int]:
        try:
            import soundfile
        except ImportError:
            raise UserError(
                "data.source=audio needs soundfile, which is not installed; install it with pip install "
                "'shardline[tasks]'."
            ) from None
        try:
            channels, rate = soundfile.read(path, dtype="float32", always_2d=True)
        except (soundfile.SoundFileError, OSError) as error:
            raise UserError(f"data.paths: {path} cannot be read as a recording ({error}); mend or remove it.") from None
        mono = one_channel(channels)
        if not np.isfinite(mono).all():
            raise UserError(f"data.paths: {path} has samples that are no finite numbers; mend or remove it.")
        return mono, rate

    def learn(self, payloads: Iterator[bytes], recipe: RowRecipe) -> RowRecipe:
        """See RowKind."""
        statistics = RunningStatistics(1)
        longest = 0
        for payload in payloads:
            sound = np.frombuffer(payload, dtype=np.float32)
            longest = max(longest, len(sound))
            statistics.add(sound[: self._num_samples or None].astype(np.float64)[:, None])
        return recipe.model_copy(
            update={
                "num_audio_samples": self._num_samples or longest,
                "sampling_rate": self._sampling_rate,
                "means": statistics.means if self._standardize else [0.0],
                "scales": statistics.scales if self._standardize else [1.0],
            }
        )

    def columns(self, payloads: list[bytes], recipe: RowRecipe) -> "dict[str, pa.Array]":
        """See RowKind; ``sound`` fp32 [samples] of each."""
        import pyarrow as pa

        sounds = [np.frombuffer(payload, dtype=np.float32) for payload in payloads]
        longest = recipe.num_audio_samples
        self.counts.num_truncated += sum(len(sound) > (longest or 0) for sound in sounds)
        return {"sound": pa.array([sound[:longest] for sound in sounds], type=pa.large_list(pa.float32()))}
