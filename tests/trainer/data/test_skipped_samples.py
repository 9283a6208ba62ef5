"""Samples that are skipped."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sharding.ranks.errors import UserError
from trainer.checkpoint.training_state import TrainingState
from trainer.config.data import SampleRange
from trainer.data.skipped_samples import SkippedSamples
from trainer.numerics.spike_policy import skip_configured

_LIMIT = 200
_ranges = st.lists(st.tuples(st.integers(0, _LIMIT), st.integers(0, _LIMIT)).map(lambda pair: tuple(sorted(pair))))


def _remaining(ranges: list[SampleRange], end: int = 3 * _LIMIT) -> list[int]:
    return [position for position in range(end) if not any(first <= position < stop for first, stop in ranges)]


@given(ranges=_ranges)
def test_numbers_are_the_remaining_positions_in_order(ranges: list[SampleRange]) -> None:
    remaining = _remaining(ranges)
    positions = SkippedSamples(ranges).positions(np.arange(len(remaining)))
    assert positions.tolist() == remaining
    assert positions.dtype == np.int64


@given(ranges=_ranges, first=st.integers(0, _LIMIT), size=st.integers(0, 50))
def test_the_positions_of_a_step_as_ranges(ranges: list[SampleRange], first: int, size: int) -> None:
    found = SkippedSamples(ranges).ranges_between(first, first + size)
    assert [position for start, stop in found for position in range(start, stop)] == _remaining(ranges)[first:][:size]
    assert all(stop < start for (_, stop), (start, _) in pairwise(found))


@given(ranges=_ranges, num_done=st.integers(0, _LIMIT), lengths=st.lists(st.integers(1, 30), min_size=1, max_size=4))
@settings(max_examples=50)
def test_what_is_skipped_later_changes_nothing_before(
    ranges: list[SampleRange], num_done: int, lengths: list[int]
) -> None:
    """Step after step may turn out bad: each time the samples that come next are skipped."""
    skipped = SkippedSamples(ranges)
    before = skipped.positions(np.arange(num_done)).tolist()
    bad: list[int] = []
    for length in lengths:
        bad += skipped.positions(np.arange(num_done, num_done + length)).tolist()
        skipped = skipped.without(skipped.ranges_between(num_done, num_done + length))
    assert skipped.positions(np.arange(num_done)).tolist() == before
    after = skipped.positions(np.arange(num_done, num_done + 50)).tolist()
    told = [position for position in _remaining(ranges, 5 * _LIMIT) if position not in {*before, *bad}]
    assert after == told[:50]
    assert skipped.ranges == SkippedSamples([*reversed(skipped.ranges), *ranges]).ranges


def _state(num_samples: int, skipped_samples: list[SampleRange]) -> TrainingState:
    return TrainingState(
        step=4,
        num_samples=num_samples,
        num_tokens=0,
        num_skipped_steps=0,
        num_skipped_in_a_row=0,
        schedule_total_steps=10,
        seed=1,
        skipped_samples=skipped_samples,
    )


def test_a_checkpoint_can_skip_only_what_it_has_not_passed() -> None:
    # 48 samples were trained on and 12 skipped: the next one is at position 60.
    state = _state(48, [(24, 36)])
    assert skip_configured(state, [(24, 36), (60, 72)]).skipped_samples == [(24, 36), (60, 72)]
    # What was skipped after a spike stays so, told or not.
    assert skip_configured(state, []).skipped_samples == [(24, 36)]
    with pytest.raises(UserError, match="names samples before position 60, which the checkpoint of step 4"):
        skip_configured(state, [(59, 72)])


def test_the_state_is_read_back_as_it_was() -> None:
    state = _state(12, [(24, 36), (48, 50)]).model_copy(update={"recent_losses": [0.1, 1 / 3]})
    assert TrainingState.model_validate_json(state.model_dump_json()) == state
