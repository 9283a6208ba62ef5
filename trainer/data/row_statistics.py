"""Mean and standard deviation of what comes in pieces, in double precision."""

import numpy as np


class RunningStatistics:
    """Mean and variance of columns, put together piece by piece (Chan, Golub and LeVeque, 1979)."""

    def __init__(self, num_columns: int) -> None:
        """Begin with no rows."""
        self._counts = np.zeros(num_columns)
        self._means = np.zeros(num_columns)
        self._squares = np.zeros(num_columns)

    def add(self, rows: np.ndarray) -> None:
        """Take in rows, float64 [rows, columns]; what is NaN is left out."""
        present = ~np.isnan(rows)
        counts = present.sum(axis=0)
        sums = np.where(present, rows, 0.0).sum(axis=0)
        means = sums / np.maximum(counts, 1)
        squares = (np.where(present, rows - means, 0.0) ** 2).sum(axis=0)
        total = self._counts + counts
        share = counts / np.maximum(total, 1)
        difference = np.where(counts > 0, means - self._means, 0.0)
        self._squares += squares + difference**2 * self._counts * share
        self._means += difference * share
        self._counts = total

    @property
    def means(self) -> list[float]:
        """Of each column, 0 where it has nothing."""
        return [float(mean) for mean in self._means]

    @property
    def scales(self) -> list[float]:
        """Standard deviation of each column, 1 where all its numbers are alike."""
        deviations = np.sqrt(self._squares / np.maximum(self._counts, 1))
        # Rounding alone may make a constant column's deviation something else than 0.
        is_constant = deviations <= 1e-12 * np.maximum(np.abs(self._means), 1.0)
        return [float(scale) for scale in np.where(is_constant, 1.0, deviations)]
