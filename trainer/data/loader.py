"""Micro-batches of samples, read ahead by a thread."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from sharding.engine import Batch
from trainer.data.mixture import MixtureOrder
from trainer.data.order import SampleOrder
from trainer.data.read_ahead import ReadAhead
from trainer.data.samples import FILLER, MicroBatch, Samples
from trainer.data.skipped_samples import SkippedSamples

ReadBeside = Callable[[Sequence[int]], Batch]
"""Columns that are kept of samples elsewhere, by the samples' indices; dim 0 of each is the sample."""

_ORDER_CHUNK = 4096
# Small steps are read further ahead, since waking the reader costs the same for any step.
_TOKENS_AHEAD = 2**17
_MIN_STEPS_AHEAD, _MAX_STEPS_AHEAD = 2, 32


class BatchLoader:
    """One rank's micro-batches, step by step.

    A step that begins with sample p covers samples [p, p + global_size) whatever the layout; micro-batch j of rank r
    takes the ``micro_size`` samples from ``p + (j * dp_degree + r) * micro_size``. Samples are those that remain where
    some are left out. Where lengths count, the step's samples are taken in the order of their lengths instead: the step
    stays the same set, and the samples of a micro-batch are alike.
    """

    def __init__(
        self,
        samples: Samples,
        order: SampleOrder | MixtureOrder,
        *,
        global_size: int,
        micro_size: int,
        dp_rank: int,
        dp_degree: int,
        start_sample: int = 0,
        skipped: SkippedSamples | None = None,
        prefetch_steps: int | None = None,
        lengths: Callable[[Sequence[int]], np.ndarray] | None = None,
        beside: ReadBeside | None = None,
    ) -> None:
        """Start reading ahead.

        Args:
            samples: whose split ``train`` is read.
            order: which sample is at which position.
            global_size: samples in a step over all ranks, a multiple of ``micro_size * dp_degree``.
            micro_size: samples in a micro-batch.
            dp_rank: this rank among those that read different data.
            dp_degree: number of those ranks.
            start_sample: samples that were consumed before.
            skipped: global positions that are left out; none by default.
            prefetch_steps: steps that are read ahead; 0 reads on demand, in the caller's thread; by default as many as
                hold 131,072 tokens, at least 2 and at most 32.
            lengths: of training samples by index; given where those of a step are put into micro-batches by length.
            beside: reads what is kept of training samples elsewhere, by their indices; None where nothing is.
        """
        self._samples = samples
        self._order = order
        self._global_size = global_size
        self._micro_size = micro_size
        self._skipped = skipped or SkippedSamples()
        self._lengths = lengths
        self._beside = beside or (lambda _: {})
        first = dp_rank * micro_size
        starts = np.arange(first, global_size, dp_degree * micro_size)
        self._local_positions = (starts[:, None] + np.arange(micro_size)).reshape(-1)
        if prefetch_steps is None:
            # Samples of unknown size are taken for large ones.
            sample_tokens = samples.facts.sequence_length or _TOKENS_AHEAD
            num_ahead = _TOKENS_AHEAD // (len(self._local_positions) * sample_tokens)
            prefetch_steps = min(max(num_ahead, _MIN_STEPS_AHEAD), _MAX_STEPS_AHEAD)
        self._steps = ReadAhead(self._read_steps(start_sample), prefetch_steps)

    def next_step(self) -> list[MicroBatch]:
        """This rank's micro-batches of the next step."""
        return self._steps.next()

    def state(self) -> None:
        """There is none: what a loader continues from is the number of samples."""

    def close(self) -> None:
        """Stop reading ahead."""
        self._steps.close()

    def _read_steps(self, start_sample: int) -> Iterator[list[MicroBatch]]:
        # The permutation of many positions costs little more than that of one, so steps are looked up in chunks.
        # Where lengths count, those of the whole step decide which samples are this rank's.
        of_step = self._local_positions if self._lengths is None else np.arange(self._global_size)
        num_steps = max(1, _ORDER_CHUNK // len(of_step))
        while True:
            starts = start_sample + self._global_size * np.arange(num_steps)
            positions = self._skipped.positions((starts[:, None] + of_step).reshape(-1))
            indices = self._order.indices(positions)
            for found in zip(positions.reshape(num_steps, -1), indices.reshape(num_steps, -1), strict=True):
                yield self._read_step(*found)
            start_sample += num_steps * self._global_size

    def _read_step(self, positions: np.ndarray, indices: np.ndarray) -> list[MicroBatch]:
        if self._lengths is not None:
            by_length = np.argsort(self._lengths(indices.tolist()), kind="stable")[self._local_positions]
            positions, indices = positions[by_length], indices[by_length]
        shape = (-1, self._micro_size)
        pairs = zip(indices.reshape(shape).tolist(), positions.reshape(shape), strict=True)
        return [
            MicroBatch(self._samples.read("train", micro), torch.from_numpy(of_micro), self._beside(micro))
            for micro, of_micro in pairs
        ]


def evaluation_batches(
    samples: Samples,
    split: str,
    *,
    micro_size: int,
    dp_rank: int,
    dp_degree: int,
    max_samples: int = 0,
    spread: bool = False,
) -> Iterator[MicroBatch]:
    """One rank's share of a split in stored order: equally many batches on every rank, every sample once.

    Where a rank has no sample left, the last one fills up, at position ``FILLER``: a rank that stopped early would
    leave the others waiting in a collective.

    Args:
        samples: what is evaluated on.
        split: which of them.
        micro_size: samples in a batch.
        dp_rank: this rank among those that read different data.
        dp_degree: number of those ranks.
        max_samples: read only so many; 0 means all.
        spread: take these at equal distances, and not the first, which of a mixture would all be of its first source,
            and of rows perhaps of one class.
    """
    available = samples.num_samples(split)
    total = min(available, max_samples or available)
    for start in range(dp_rank * micro_size, _round_up(total, dp_degree * micro_size), dp_degree * micro_size):
        positions = np.arange(start, start + micro_size)
        numbers = np.minimum(positions, total - 1)
        indices = numbers * available // total if spread else numbers
        read = samples.read(split, indices.tolist())
        yield MicroBatch(read, torch.from_numpy(np.where(positions < total, positions, FILLER)))


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
