"""The order of samples: a permutation of every epoch, and a function of position alone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.order import SampleOrder

sizes = st.integers(min_value=1, max_value=3000)
seeds = st.integers(min_value=0, max_value=2**63 - 1)


@given(seed=seeds, size=sizes, epoch=st.integers(min_value=0, max_value=1000))
@settings(max_examples=60)
def test_every_epoch_is_a_permutation(seed: int, size: int, epoch: int) -> None:
    positions = np.arange(epoch * size, (epoch + 1) * size)
    assert np.array_equal(np.sort(SampleOrder(seed, size).indices(positions)), np.arange(size))


@given(seed=seeds, size=sizes, data=st.data())
@settings(max_examples=60)
def test_any_chunks_in_any_sequence_give_the_same(seed: int, size: int, data: st.DataObject) -> None:
    total = 3 * size
    whole = SampleOrder(seed, size).indices(np.arange(total))
    cuts = sorted(data.draw(st.lists(st.integers(0, total), max_size=5)))
    bounds = list(zip([0, *cuts], [*cuts, total], strict=True))
    order = SampleOrder(seed, size)
    for begin, end in data.draw(st.permutations(bounds)):
        assert np.array_equal(order.indices(np.arange(begin, end)), whole[begin:end])


@given(seed=seeds)
@settings(max_examples=30)
def test_epochs_and_seeds_have_orders_of_their_own(seed: int) -> None:
    size = 500
    first = SampleOrder(seed, size).indices(np.arange(size))
    assert not np.array_equal(first, np.arange(size))
    assert not np.array_equal(first, SampleOrder(seed, size).indices(np.arange(size, 2 * size)))
    assert not np.array_equal(first, SampleOrder(seed + 1, size).indices(np.arange(size)))


def test_the_order_is_mixed_well() -> None:
    size = 20_000
    indices = SampleOrder(1, size).indices(np.arange(size))
    # Neighbours are far apart: for a random order a third of the size on average, with a spread of 0.24 / sqrt(size).
    assert np.abs(np.diff(indices)).mean() / size == pytest.approx(1 / 3, abs=0.01)
    assert np.corrcoef(np.arange(size), indices)[0, 1] == pytest.approx(0, abs=0.03)


def test_an_order_of_a_trillion_sequences_costs_nothing() -> None:
    order = SampleOrder(3, 10**12)
    indices = order.indices(np.array([0, 1, 10**12 - 1, 10**12, 5 * 10**12 + 7]))
    assert ((indices >= 0) & (indices < 10**12)).all()
    assert len(set(indices.tolist())) == 5


def test_without_shuffling_sequences_come_as_they_are_stored() -> None:
    assert SampleOrder(0, 4, shuffle=False).indices(np.arange(6)).tolist() == [0, 1, 2, 3, 0, 1]


def test_an_empty_epoch_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one sample"):
        SampleOrder(0, 0)
