"""Samples that are skipped: how the order of what remains is computed from ranges of positions, never stored."""

from collections.abc import Iterable, Sequence

import numpy as np

from trainer.config.data import SampleRange


class SkippedSamples:
    """Maps numbers of the samples that remain, counted from 0, to global sample positions.

    A global position says which sample comes when, over all epochs (``trainer.data.order``). Number n is the n-th
    position outside the ranges, so skipping a range that nobody has reached changes nothing before it.
    """

    def __init__(self, ranges: Iterable[Sequence[int]] = ()) -> None:
        """Leave out ranges of global positions, in any order; they may overlap.

        Args:
            ranges: pairs of the first position and the one after the last.
        """
        self.ranges = _merge(ranges)
        lengths = [end - first for first, end in self.ranges]
        self._num_left_out = np.cumsum([0, *lengths])
        # How many samples remain before each range.
        self._numbers = np.array([first for first, _ in self.ranges], dtype=np.int64) - self._num_left_out[:-1]

    def positions(self, numbers: np.ndarray) -> np.ndarray:
        """Global positions, int64, of the samples with these numbers, int64 of the same shape."""
        return numbers + self._num_left_out[np.searchsorted(self._numbers, numbers, side="right")]

    def position(self, number: int) -> int:
        """Global position of the sample with this number."""
        return int(self.positions(np.array([number]))[0])

    def ranges_between(self, first: int, end: int) -> list[SampleRange]:
        """The global positions of numbers [first, end), as ranges in order."""
        ranges = []
        while first < end:
            start = self.position(first)
            # Up to the next range that is skipped.
            after = [int(number) for number in self._numbers if number > first]
            stop = min([end, *after])
            ranges.append((start, start + stop - first))
            first = stop
        return ranges

    def without(self, ranges: Iterable[Sequence[int]]) -> "SkippedSamples":
        """The same with further ranges skipped."""
        return SkippedSamples([*self.ranges, *ranges])

    def agrees_before(self, other: "SkippedSamples", position: int) -> bool:
        """Whether both skip the same positions below one."""
        return _below(self.ranges, position) == _below(other.ranges, position)


def _merge(ranges: Iterable[Sequence[int]]) -> tuple[SampleRange, ...]:
    merged: list[SampleRange] = []
    for first, end in sorted((int(first), int(end)) for first, end in ranges):
        if first >= end:
            continue
        if merged and first <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((first, end))
    return tuple(merged)


def _below(ranges: Iterable[SampleRange], position: int) -> list[SampleRange]:
    return [(first, min(end, position)) for first, end in ranges if first < position]
