"""Samples that are computed, the same everywhere: ratings of items by users, and tones."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

GENERATOR_VERSION = 1
"""Another one makes other samples."""

SAMPLING_RATE = 8000
"""Samples of a tone in a second."""

NUM_TONES = 1200
NUM_RATINGS = 12_000

_NUM_TONE_SAMPLES = 2000
_NOISE = 0.3
_STEPS = 32767
_NUM_USERS, _NUM_ITEMS, _NUM_TASTES = 200, 120, 3


@dataclass(frozen=True)
class Tone:
    """A quarter of a second of one instrument.

    Attributes:
        sound: fp32 [samples], between -1 and 1.
        instrument: its wave: ``sine``, ``triangle``, ``sawtooth`` or ``square``.
    """

    sound: np.ndarray
    instrument: str


@dataclass(frozen=True)
class Rating:
    """What a user thinks of an item, from 1 to 5."""

    user: str
    item: str
    stars: float


def generated_tones() -> Iterator[Tone]:
    """Tones of 110 to 440 Hz at any phase and loudness, with noise; instruments take turns."""
    # The one generator whose numbers stay the same over all versions of NumPy.
    random = np.random.RandomState(0)
    waves = {
        "sine": lambda phase: np.sin(2 * np.pi * phase),
        "triangle": lambda phase: 4 * np.abs(phase % 1 - 0.5) - 1,
        "sawtooth": lambda phase: 2 * (phase % 1) - 1,
        "square": lambda phase: np.where(phase % 1 < 0.5, 1.0, -1.0),
    }
    seconds = np.arange(_NUM_TONE_SAMPLES) / SAMPLING_RATE
    for number in range(NUM_TONES):
        instrument = list(waves)[number % len(waves)]
        frequency_hz, shift, loudness = 110 * 4 ** random.rand(), random.rand(), 0.2 + 0.4 * random.rand()
        wave = loudness * waves[instrument](frequency_hz * seconds + shift)
        noise = _NOISE * loudness * random.randn(_NUM_TONE_SAMPLES)
        # In steps of 16 bits, as recordings have them, since the last bits of a sine are each machine's own.
        steps = np.round(np.clip(wave + noise, -1, 1) * _STEPS)
        yield Tone((steps / _STEPS).astype(np.float32), instrument)


def generated_ratings() -> Iterator[Rating]:
    """Each rating is the mean, the user's kindness, the item's quality, how their tastes agree, and noise.

    The noise alone has a standard deviation of 0.3: no model has a smaller root mean square error.
    """
    random = np.random.RandomState(1)
    kindness, quality = 0.3 * random.randn(_NUM_USERS), 0.5 * random.randn(_NUM_ITEMS)
    tastes = 0.6 * random.randn(_NUM_USERS, _NUM_TASTES)
    traits = 0.6 * random.randn(_NUM_ITEMS, _NUM_TASTES)
    # Each pair of user and item once at most.
    pairs = random.permutation(_NUM_USERS * _NUM_ITEMS)[:NUM_RATINGS]
    for user, item in zip(*np.divmod(pairs, _NUM_ITEMS), strict=True):
        stars = 3 + kindness[user] + quality[item] + tastes[user] @ traits[item] + 0.3 * random.randn()
        yield Rating(f"u{user:03}", f"i{item:03}", round(float(np.clip(stars, 1, 5)), 2))
