"""The order in which samples are visited: a keyed permutation that is computed, never stored."""

import hashlib

import numpy as np

_NUM_ROUNDS = 6
_U64 = np.uint64


class SampleOrder:
    """Maps a global sample position, counted over all epochs, to the index of a sample.

    Each epoch is a permutation of all samples, keyed by (seed, epoch): a Feistel network (Luby and Rackoff, "How to
    construct pseudorandom permutations from pseudorandom functions", 1988) over the smallest even number of bits that
    holds the count, with cycle-walking (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002) for positions
    that fall outside it. It needs O(1) memory and gives any position at once, so it depends on no rank and no history.
    """

    def __init__(self, seed: int, num_samples: int, shuffle: bool = True) -> None:
        """Fix the order.

        Args:
            seed: key of the permutations.
            num_samples: samples in one epoch, at least 1.
            shuffle: false visits samples in stored order in every epoch.
        """
        if num_samples < 1:
            raise ValueError(f"num_samples={num_samples}: an epoch has at least one sample")
        self.num_samples = num_samples
        self._seed = seed
        self._shuffle = shuffle
        half_bits = max(1, ((num_samples - 1).bit_length() + 1) // 2)
        self._half_bits = _U64(half_bits)
        self._half_mask = _U64((1 << half_bits) - 1)
        self._keys: dict[int, np.ndarray] = {}

    def indices(self, positions: np.ndarray) -> np.ndarray:
        """Sample indices, int64, of global positions, int64 of any one shape [n]."""
        epochs, offsets = np.divmod(positions, self.num_samples)
        if not self._shuffle:
            return offsets
        result = np.empty_like(offsets)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            result[chosen] = self._permute(offsets[chosen], int(epoch))
        return result

    def epochs(self, positions: np.ndarray) -> np.ndarray:
        """The epoch, from 0, that each global position is in."""
        return positions // self.num_samples

    def _permute(self, offsets: np.ndarray, epoch: int) -> np.ndarray:
        keys = self._epoch_keys(epoch)
        values = self._feistel(offsets.astype(_U64), keys)
        outside = values >= self.num_samples
        while outside.any():
            values[outside] = self._feistel(values[outside], keys)
            outside = values >= self.num_samples
        return values.astype(np.int64)

    def _feistel(self, values: np.ndarray, keys: np.ndarray) -> np.ndarray:
        left, right = values >> self._half_bits, values & self._half_mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & self._half_mask)
        return (left << self._half_bits) | right

    def _epoch_keys(self, epoch: int) -> np.ndarray:
        if epoch not in self._keys:
            digest = hashlib.blake2b(f"{self._seed}:{epoch}".encode(), digest_size=8 * _NUM_ROUNDS).digest()
            # Two epochs are in use at once at most: where a batch straddles them.
            self._keys = dict(list(self._keys.items())[-1:]) | {epoch: np.frombuffer(digest, dtype="<u8")}
        return self._keys[epoch]


def _mix(values: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014)."""
    values = (values ^ (values >> _U64(30))) * _U64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> _U64(27))) * _U64(0x94D049BB133111EB)
    return values ^ (values >> _U64(31))
