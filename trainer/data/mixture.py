"""Weighted mixtures: which source, and which sample of it, stands at a position; computed, never stored."""

import hashlib
import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from trainer.data.order import SampleOrder


def integer_shares(weights: Sequence[float]) -> list[int]:
    """The smallest integers in the proportion of the weights, each weight taken as the decimal number that it reads."""
    fractions = [Fraction(repr(weight)) for weight in weights]
    scale = math.lcm(*(fraction.denominator for fraction in fractions))
    numbers = [int(fraction * scale) for fraction in fractions]
    divisor = math.gcd(*numbers)
    return [number // divisor for number in numbers]


@dataclass(frozen=True)
class _Node:
    """Two parts of a mixture that are interleaved; a part is a node or a source's number."""

    share: int
    left_share: int
    left: "_Node | int"
    right: "_Node | int"


class WeightedInterleaving:
    """Divides positions among sources in exact proportion.

    Two parts with shares a and b - a are interleaved by rounding: of the first n positions, round(n a / b) belong to
    the first, as the pixels of Bresenham's line do. More are divided along a binary tree that joins the two smallest
    shares first (Huffman, 1952). In the first n positions a source's count differs from its share of n by at most
    (1 + sum of w / w_i) / 2, where w is its share and the w_i are those of the nodes above it, without the root: each
    node passes on its own deviation in proportion and adds at most 1/2. That is at most 1/2 for two sources and below
    1 for three; and since the w_i of such a tree grow at least as Fibonacci's numbers do, below 1.7 for any number.
    A position costs as many steps as the tree is deep, and needs no history.
    """

    def __init__(self, names: Sequence[str], shares: Sequence[int]) -> None:
        """Fix the division; it depends on names and shares, and not on their order.

        Args:
            names: of the sources.
            shares: positive integers.
        """
        self.names = tuple(names)
        self.shares = tuple(shares)
        heap: list[tuple[int, str, _Node | int]] = [
            (share, name, number) for number, (name, share) in enumerate(zip(names, shares, strict=True))
        ]
        heapq.heapify(heap)
        while len(heap) > 1:
            (right_share, right_name, right), (left_share, left_name, left) = heapq.heappop(heap), heapq.heappop(heap)
            node = _Node(left_share + right_share, left_share, left, right)
            heapq.heappush(heap, (node.share, min(left_name, right_name), node))
        self._root = heap[0][2]
        # Products of two numbers below the total must fit; beyond that, Python's own integers are exact and slower.
        self._dtype: Any = np.int64 if sum(shares) < 1 << 31 else object

    def places(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For global positions, int64 [n]: the number of the source, and how many of its positions came before."""
        sources = np.empty(len(positions), dtype=np.int64)
        counts = np.empty(len(positions), dtype=np.int64)
        self._divide(self._root, np.arange(len(positions)), positions.astype(self._dtype), sources, counts)
        return sources, counts

    def _divide(
        self, part: _Node | int, chosen: np.ndarray, positions: np.ndarray, sources: np.ndarray, counts: np.ndarray
    ) -> None:
        if isinstance(part, int):
            sources[chosen], counts[chosen] = part, positions
            return
        num_left = _rounded_share(positions, part)
        goes_left = (_rounded_share(positions + 1, part) > num_left).astype(bool)
        self._divide(part.left, chosen[goes_left], num_left[goes_left], sources, counts)
        self._divide(part.right, chosen[~goes_left], (positions - num_left)[~goes_left], sources, counts)


def _rounded_share(counts: np.ndarray, node: _Node) -> np.ndarray:
    """How many of the first so many positions of a node are its left part's."""
    whole, rest = counts // node.share, counts % node.share
    return whole * node.left_share + (rest * node.left_share + node.share // 2) // node.share


class MixtureOrder:
    """Maps a global position to a sample of a mixture, each source visited in epochs of its own.

    Sequences are numbered through: those of the second source follow those of the first.
    """

    def __init__(
        self, seed: int, interleaving: WeightedInterleaving, num_samples: Sequence[int], shuffle: bool = True
    ) -> None:
        """Fix the order.

        Args:
            seed: the run's seed; each source's permutations are keyed by it and the source's name.
            interleaving: which source has which position.
            num_samples: samples in one epoch of each source, at least 1.
            shuffle: false visits each source's samples in stored order.
        """
        self._interleaving = interleaving
        self._orders = [
            SampleOrder(_source_seed(seed, name), size, shuffle)
            for name, size in zip(interleaving.names, num_samples, strict=True)
        ]
        self._first_indices = np.cumsum([0, *num_samples])

    def indices(self, positions: np.ndarray) -> np.ndarray:
        """Sample indices, int64, of global positions, int64 [n]."""
        sources, counts = self._interleaving.places(positions)
        result = np.empty(len(positions), dtype=np.int64)
        for number in np.unique(sources):
            chosen = sources == number
            result[chosen] = self._orders[number].indices(counts[chosen]) + self._first_indices[number]
        return result

    def epochs(self, positions: np.ndarray) -> np.ndarray:
        """The epoch, from 0, that the source of each position is in."""
        sources, counts = self._interleaving.places(positions)
        return counts // np.array([order.num_samples for order in self._orders])[sources]


def _source_seed(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=7).digest(), "little")
