"""Samples that are computed."""

import hashlib
from collections import Counter

import numpy as np

from trainer.data.generated import NUM_RATINGS, NUM_TONES, generated_ratings, generated_tones


def test_tones_are_the_same_each_time_and_as_many_of_each_instrument() -> None:
    tones = list(generated_tones())
    assert Counter(tone.instrument for tone in tones) == dict.fromkeys(
        ("sine", "triangle", "sawtooth", "square"), NUM_TONES // 4
    )
    sounds = np.stack([tone.sound for tone in tones])
    assert sounds.dtype == np.float32
    assert np.abs(sounds).max() <= 1
    assert np.array_equal(sounds, np.stack([tone.sound for tone in generated_tones()]))
    assert len({hashlib.sha256(sound.tobytes()).hexdigest() for sound in sounds}) == NUM_TONES


def test_ratings_follow_from_tastes_and_no_pair_is_rated_twice() -> None:
    ratings = list(generated_ratings())
    pairs = {(rating.user, rating.item) for rating in ratings}
    assert len(ratings) == len(pairs) == NUM_RATINGS
    stars = np.array([rating.stars for rating in ratings])
    assert stars.min() >= 1
    assert stars.max() <= 5
    # Users and items alone explain less than the noise would leave, so there is something for embeddings to find.
    means = {}
    for which in ("user", "item"):
        sums: dict[str, list[float]] = {}
        for rating in ratings:
            sums.setdefault(getattr(rating, which), []).append(rating.stars)
        means[which] = {name: float(np.mean(values)) for name, values in sums.items()}
    additive = np.array([means["user"][r.user] + means["item"][r.item] for r in ratings]) - stars.mean()
    assert 0.3**2 < np.var(stars - additive) < np.var(stars)
    assert np.var(stars - additive) > 2 * 0.3**2
