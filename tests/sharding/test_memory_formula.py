"""The memory formula, against sums written out by hand."""

from dataclasses import replace
from typing import Any

import pytest

from sharding.config import Strategy
from sharding.memory_formula import (
    BUCKET_ELEMENTS,
    FrozenBytes,
    Layout,
    ModelSizes,
    StateBytes,
    bucket_elements,
    frozen_bytes,
    state_bytes,
)

# Ten blocks of 90, and 100 outside of them, of which one tied matrix of 80.
SIZES = ModelSizes(
    num_parameters=1000,
    num_outside_blocks=100,
    largest_block=90,
    largest_parameter=80,
    largest_shared=80,
)


def _state(strategy: Strategy, num_shards: int = 4, **options: Any) -> StateBytes:
    return state_bytes(SIZES, Layout(strategy, num_shards, **options))


@pytest.mark.parametrize(
    ("strategy", "options", "expected"),
    [
        # Gradients of both uses of the tied matrix, and their sum.
        ("ddp", {}, StateBytes(4000, 0, 4000, 8000, 4 * 240)),
        # Copies of all in two bytes, in which gradients come; one is then converted.
        ("ddp", {"compute_bytes": 2}, StateBytes(4000, 2000, 4000, 8000, 2 * 240 + 4 * 80)),
        ("none", {"moment_bytes": 4.0}, StateBytes(4000, 0, 4000, 4000, 4 * 240)),
        ("zero1", {}, StateBytes(1000, 4000, 4000, 2000, 4 * 160)),
        ("zero1", {"compute_bytes": 2}, StateBytes(1000, 2000, 4000, 2000, 2 * 160)),
        # In a block, its gradients, those of the block before on their way, and the head's: more than at the end all
        # outside of blocks, their copy on its way, and a quarter as their sum.
        ("zero2", {}, StateBytes(1000, 4000, 1000, 2000, 4 * (80 + 90 + 90))),
        # Without accumulation most is held when backward begins: the head's gradient, and two blocks'.
        ("zero2", {"accumulation_steps": 1}, StateBytes(1000, 4000, 0, 2000, 4 * (80 + 90 + 90))),
        ("zero1", {"accumulation_steps": 1}, StateBytes(1000, 4000, 0, 2000, 4 * (80 + 90 + 90))),
        ("zero3", {}, StateBytes(1000, 4 * (100 + 2 * 90), 1000, 2000, 4 * (80 + 90 + 90))),
        ("hsdp", {}, StateBytes(1000, 4 * (100 + 2 * 90), 1000, 2000, 4 * (80 + 90 + 90))),
        ("zero3", {"compute_bytes": 2}, StateBytes(1000, 2 * (100 + 2 * 90), 1000, 2000, 2 * (80 + 90) + 4 * 90)),
    ],
)
def test_state_is_what_the_stages_hold(strategy: Strategy, options: dict[str, Any], expected: StateBytes) -> None:
    assert _state(strategy, **options) == expected


def test_buckets_in_flight_are_counted() -> None:
    # Four sums under way, the matrix that is larger than a bucket by itself, and its gradients.
    first = _state("zero1", is_bucketed=True, bucket_elements=20)
    assert first == StateBytes(1000, 3000, 4000, 2000, 4 * (4 * 20 + 80 + 160))
    # Each with room to receive; and the buckets of a block of 90, with two more at its ends, are being filled.
    second = _state("zero2", is_bucketed=True, bucket_elements=20)
    assert second == StateBytes(1000, 3000, 1000, 2000, 4 * (2 * 4 * 20 + 2 * 80 + 7 * 20 + 160))
    # In 16 bits masters are no part of what is gathered.
    assert _state("zero2", is_bucketed=True, compute_bytes=2).gathered == 2000
    # Parameters outside of blocks and of three blocks are gathered, the first one for good, here in two bytes.
    third = _state("zero3", is_bucketed=True, bucket_elements=20, compute_bytes=2)
    in_flight = 4 * (2 * 4 * 20 + 2 * 80 + 5 * 20) + 2 * 160
    assert third == StateBytes(1000, 2 * (100 + 3 * 90), 1000, 2000, in_flight)
    # Never more than there are: one of them, sent and received, and filled by the next micro-batch meanwhile.
    small = _state("zero2", is_bucketed=True, bucket_elements=1 << 20)
    assert small.in_flight == 4 * (3 * (1 << 20) + 160)
    # In stage 3 every block has one of its own, and what is in no block has another.
    blocks = _state("zero3", is_bucketed=True, bucket_elements=1 << 20)
    assert blocks.in_flight == 4 * ((2 * 4 + 1) * (1 << 20) + 160)


def test_buckets_grow_with_the_ranks_beyond_a_node() -> None:
    sizes = [bucket_elements("cuda", num_shards) for num_shards in (1, 8, 16, 32, 512)]
    assert sizes == [BUCKET_ELEMENTS["cuda"] * growth for growth in (1, 1, 2, 4, 4)]


def test_an_embedding_by_itself_is_gathered_for_a_moment() -> None:
    # Of the 100 outside of blocks 50 are an embedding, and 40 a projection.
    apart = replace(SIZES, largest_parameter=50, largest_shared=0, num_embedding=50, num_trained_embedding=50)
    frozen = replace(apart, num_parameters=950, num_outside_blocks=50, num_trained_embedding=0, largest_parameter=40)
    frozen = replace(frozen, num_frozen=50, num_frozen_outside_blocks=50)
    for sizes, own in ((apart, 1000), (frozen, 950)):
        # The head's gradient has left when backward comes to a block.
        expected = StateBytes(1000, 4 * (50 + 2 * 90), own, 2 * own, 4 * (90 + 90))
        assert state_bytes(sizes, Layout("zero3", 4)) == expected
        assert state_bytes(sizes, Layout("zero2", 4)) == replace(expected, gathered=4000)
        assert frozen_bytes(sizes, Layout("zero2", 4)) == FrozenBytes(1000, 4 * (50 + 2 * 90))
    # Where embedding and head are larger than blocks, most is under way as they are reduced, one after the other.
    large = replace(apart, largest_block=5)
    assert state_bytes(large, Layout("zero2", 4)).in_flight == (4 + 4 + 1) * 50


def test_frozen_parameters_are_held_and_no_more() -> None:
    # Of another 2000, 1800 in ten blocks, and 200 outside of them.
    frozen = replace(SIZES, num_frozen=2000, num_frozen_outside_blocks=200, largest_gathered_block=270)

    def state(strategy: Strategy, **options: Any) -> StateBytes:
        return state_bytes(frozen, Layout(strategy, 4, **options))

    def grown(before: StateBytes, masters: float, gathered: float) -> StateBytes:
        return replace(before, masters=before.masters + masters, gathered=before.gathered + gathered)

    assert state("ddp") == grown(_state("ddp"), 8000, 0)
    # What is frozen is copied as well.
    assert state("ddp", compute_bytes=2) == grown(_state("ddp", compute_bytes=2), 8000, 4000)
    for strategy in ("zero1", "zero2"):
        assert state(strategy) == grown(_state(strategy), 2000, 8000)
        assert state(strategy, is_bucketed=True) == grown(_state(strategy, is_bucketed=True), 2000, 6000)
    # The gathered blocks have 180 more each, and one more that arrives is more than a block's gradients.
    assert state("zero3") == replace(grown(_state("zero3"), 2000, 4 * (200 + 2 * 180)), in_flight=4 * (80 + 270))
    bucketed = _state("zero3", is_bucketed=True)
    assert state("zero3", is_bucketed=True) == grown(bucketed, 2000, 4 * (200 + 3 * 180) - (200 + 180))


@pytest.mark.parametrize(
    ("strategy", "compute_bytes", "expected"),
    [
        ("none", 4, FrozenBytes(4000, 0)),
        # Copies of all in two bytes.
        ("ddp", 2, FrozenBytes(4000, 2 * 1000)),
        # Whatever of the trained model is whole, of this one no more than a block, and the next one.
        *((strategy, 4, FrozenBytes(1000, 4 * (100 + 2 * 90))) for strategy in ("zero1", "zero2", "zero3", "hsdp")),
        ("zero3", 2, FrozenBytes(1000, 2 * (100 + 2 * 90))),
    ],
)
def test_a_model_that_is_only_run_has_parameters_alone(
    strategy: Strategy, compute_bytes: int, expected: FrozenBytes
) -> None:
    assert frozen_bytes(SIZES, Layout(strategy, 4, compute_bytes=compute_bytes)) == expected


def test_more_ranks_never_hold_more() -> None:
    for strategy in ("zero1", "zero2", "zero3"):
        totals = [_state(strategy, num_shards).total for num_shards in (1, 2, 4, 8, 64)]
        assert totals == sorted(totals, reverse=True)
        assert totals[-1] < totals[0]
