"""Batches of packed sequences, read ahead by a thread."""

from collections.abc import Iterator

import numpy as np

from sharding.engine import Batch
from trainer.data.batch import IGNORED_LABEL, packed_batch
from trainer.data.mixture import MixtureOrder
from trainer.data.order import SampleOrder
from trainer.data.read_ahead import ReadAhead
from trainer.data.shards import Sequences, StreamUnion
from trainer.data.skipped_samples import SkippedSamples

_ORDER_CHUNK = 4096
# Small steps are read further ahead, since waking the reader costs the same for any step.
_TOKENS_AHEAD = 2**17
_MIN_STEPS_AHEAD, _MAX_STEPS_AHEAD = 2, 32


class BatchLoader:
    """One rank's micro-batches, step by step.

    A step that begins with sample p covers samples [p, p + global_size) whatever the layout; micro-batch j of rank r
    takes the ``micro_size`` samples from ``p + (j * dp_degree + r) * micro_size``. Samples are those that remain where
    some are left out.
    """

    def __init__(
        self,
        stream: Sequences,
        order: SampleOrder | MixtureOrder,
        *,
        sequence_length: int,
        global_size: int,
        micro_size: int,
        dp_rank: int,
        dp_degree: int,
        start_sample: int = 0,
        skipped: SkippedSamples | None = None,
        prefetch_steps: int | None = None,
        document_mask: bool = False,
    ) -> None:
        """Start reading ahead.

        Args:
            stream: the tokens.
            order: which sequence is at which position.
            sequence_length: tokens in a sequence.
            global_size: sequences in a step over all ranks, a multiple of ``micro_size * dp_degree``.
            micro_size: sequences in a micro-batch.
            dp_rank: this rank among those that read different data.
            dp_degree: number of those ranks.
            start_sample: samples that were consumed before.
            skipped: global positions that are left out; none by default.
            prefetch_steps: steps that are read ahead; 0 reads on demand, in the caller's thread; by default as many as
                hold 131,072 tokens, at least 2 and at most 32.
            document_mask: see ``read_sequences``.
        """
        self._stream = stream
        self._order = order
        self._sequence_length = sequence_length
        self._global_size = global_size
        self._micro_size = micro_size
        self._document_mask = document_mask
        self._skipped = skipped or SkippedSamples()
        first = dp_rank * micro_size
        starts = np.arange(first, global_size, dp_degree * micro_size)
        self._local_positions = (starts[:, None] + np.arange(micro_size)).reshape(-1)
        if prefetch_steps is None:
            num_ahead = _TOKENS_AHEAD // (len(self._local_positions) * sequence_length)
            prefetch_steps = min(max(num_ahead, _MIN_STEPS_AHEAD), _MAX_STEPS_AHEAD)
        self._steps = ReadAhead(self._read_steps(start_sample), prefetch_steps)

    def next_step(self) -> list[Batch]:
        """This rank's micro-batches of the next step, each as ``read_sequences`` gives it."""
        return self._steps.next()

    def state(self) -> None:
        """There is none: what a loader continues from is the number of sequences."""

    def close(self) -> None:
        """Stop reading ahead."""
        self._steps.close()

    def _read_steps(self, start_sample: int) -> Iterator[list[Batch]]:
        # The permutation of many positions costs little more than that of one, so steps are looked up in chunks.
        num_steps = max(1, _ORDER_CHUNK // len(self._local_positions))
        while True:
            starts = start_sample + self._global_size * np.arange(num_steps)
            positions = self._skipped.positions((starts[:, None] + self._local_positions).reshape(-1))
            for indices in self._order.indices(positions).reshape(num_steps, -1, self._micro_size):
                yield [
                    read_sequences(self._stream, micro.tolist(), self._sequence_length, self._document_mask)
                    for micro in indices
                ]
            start_sample += num_steps * self._global_size


def read_sequences(stream: Sequences, indices: list[int], sequence_length: int, document_mask: bool = False) -> Batch:
    """Read sequences by index.

    Args:
        stream: the tokens.
        indices: which sequences.
        sequence_length: tokens in a sequence.
        document_mask: keep documents apart, see ``packed_batch``.

    Returns:
        See ``packed_batch``; a label beyond the end of the stream is -100.
    """
    tokens = np.empty((len(indices), sequence_length + 1), dtype=np.int64)
    is_start = np.zeros(tokens.shape, dtype=bool) if document_mask else None
    short_rows = []
    for row, index in enumerate(indices):
        source, local_index = stream.locate(index, sequence_length)
        start = local_index * sequence_length
        stop = start + sequence_length + 1
        if stop <= source.num_tokens:
            source.read_into(start, stop, tokens[row])
        else:
            num_read = source.num_tokens - start
            source.read_into(start, source.num_tokens, tokens[row, :num_read])
            tokens[row, num_read:] = 0
            short_rows.append((row, num_read))
        if is_start is not None:
            is_start[row, source.document_starts(start, stop) - start] = True
    batch = packed_batch(tokens, is_start)
    for row, num_read in short_rows:
        batch["labels"][row, num_read - 1 :] = IGNORED_LABEL
    return batch


def evaluation_batches(
    stream: Sequences,
    *,
    sequence_length: int,
    micro_size: int,
    dp_rank: int,
    dp_degree: int,
    max_sequences: int = 0,
    document_mask: bool = False,
) -> Iterator[Batch]:
    """One rank's share of a split in stored order: equally many batches on every rank, every sequence once.

    Where a rank has no sequence left, rows are filled up with masked labels: a rank that stopped early would leave the
    others waiting in a collective.

    Args:
        stream: the tokens.
        sequence_length: tokens in a sequence.
        micro_size: sequences in a batch.
        dp_rank: this rank among those that read different data.
        dp_degree: number of those ranks.
        max_sequences: read only the first so many, of a mixture so many at equal distances; 0 means all.
        document_mask: see ``read_sequences``.
    """
    available = stream.num_sequences(sequence_length)
    total = min(available, max_sequences or available)
    # The first sequences of a mixture would all be of its first source.
    spread = isinstance(stream, StreamUnion)
    for start in range(dp_rank * micro_size, _round_up(total, dp_degree * micro_size), dp_degree * micro_size):
        numbers = [min(number, total - 1) for number in range(start, start + micro_size)]
        indices = [number * available // total for number in numbers] if spread else numbers
        batch = read_sequences(stream, indices, sequence_length, document_mask)
        num_missing = max(0, start + micro_size - total)
        if num_missing:
            batch["labels"][max(0, micro_size - num_missing) :] = IGNORED_LABEL
        yield batch


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
