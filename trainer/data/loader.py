"""Batches of packed sequences, read ahead by a thread."""

import contextlib
import queue
import threading
from collections.abc import Iterator

import numpy as np
import torch

from trainer.data.order import SampleOrder
from trainer.data.shards import TokenStream, num_samples

IGNORED_LABEL = -100
_ORDER_CHUNK = 4096

Batch = dict[str, torch.Tensor]


class BatchLoader:
    """One rank's micro-batches, step by step.

    A step that begins at global sample position p covers positions [p, p + global_size) whatever the layout;
    micro-batch j of rank r takes the ``micro_size`` positions from ``p + (j * dp_degree + r) * micro_size``.
    """

    def __init__(
        self,
        stream: TokenStream,
        order: SampleOrder,
        *,
        sequence_length: int,
        global_size: int,
        micro_size: int,
        dp_rank: int,
        dp_degree: int,
        start_sample: int = 0,
        prefetch_steps: int = 2,
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
            start_sample: global position of the first step.
            prefetch_steps: steps that are read ahead; 0 reads on demand, in the caller's thread.
        """
        self._stream = stream
        self._order = order
        self._sequence_length = sequence_length
        self._global_size = global_size
        self._micro_size = micro_size
        first = dp_rank * micro_size
        starts = np.arange(first, global_size, dp_degree * micro_size)
        self._local_positions = (starts[:, None] + np.arange(micro_size)).reshape(-1)
        self._steps = self._read_steps(start_sample)
        self._queue: queue.Queue[list[Batch] | BaseException] | None = None
        self._closed = threading.Event()
        if prefetch_steps:
            self._queue = queue.Queue(maxsize=prefetch_steps)
            self._thread = threading.Thread(target=self._fill_queue, name="batch-loader", daemon=True)
            self._thread.start()

    def next_step(self) -> list[Batch]:
        """This rank's micro-batches of the next step: ``input_ids`` and shifted ``labels``, int64 [micro, length]."""
        if self._queue is None:
            return next(self._steps)
        item = self._queue.get()
        if isinstance(item, BaseException):
            raise item
        return item

    def close(self) -> None:
        """Stop reading ahead."""
        self._closed.set()
        if self._queue is not None:
            with contextlib.suppress(queue.Empty):
                while True:
                    self._queue.get_nowait()
            self._thread.join()

    def _fill_queue(self) -> None:
        assert self._queue is not None
        try:
            for step in self._steps:
                if not self._put(step):
                    return
        except BaseException as error:  # noqa: BLE001 - the training thread must hear of whatever ends this one
            self._put(error)

    def _put(self, item: list[Batch] | BaseException) -> bool:
        assert self._queue is not None
        while not self._closed.is_set():
            with contextlib.suppress(queue.Full):
                self._queue.put(item, timeout=0.1)
                return True
        return False

    def _read_steps(self, start_sample: int) -> Iterator[list[Batch]]:
        # The permutation of many positions costs little more than that of one, so steps are looked up in chunks.
        num_steps = max(1, _ORDER_CHUNK // len(self._local_positions))
        while True:
            starts = start_sample + self._global_size * np.arange(num_steps)
            positions = (starts[:, None] + self._local_positions).reshape(-1)
            for indices in self._order.indices(positions).reshape(num_steps, -1, self._micro_size):
                yield [read_sequences(self._stream, micro.tolist(), self._sequence_length) for micro in indices]
            start_sample += num_steps * self._global_size


def read_sequences(stream: TokenStream, indices: list[int], sequence_length: int) -> Batch:
    """Read sequences by index.

    Returns:
        ``input_ids`` and ``labels``, int64 [len(indices), sequence_length]; a label is the token that follows, and -100
        beyond the end of the stream.
    """
    tokens = np.empty((len(indices), sequence_length + 1), dtype=np.int64)
    short_rows = []
    for row, index in enumerate(indices):
        start = index * sequence_length
        stop = start + sequence_length + 1
        if stop <= stream.num_tokens:
            stream.read_into(start, stop, tokens[row])
        else:
            num_read = stream.num_tokens - start
            stream.read_into(start, stream.num_tokens, tokens[row, :num_read])
            tokens[row, num_read:] = 0
            short_rows.append((row, num_read))
    whole = torch.from_numpy(tokens)
    # A copy: masking labels in place must not reach the inputs.
    input_ids, labels = whole[:, :-1], whole[:, 1:].clone()
    for row, num_read in short_rows:
        labels[row, num_read - 1 :] = IGNORED_LABEL
    if torch.cuda.is_available():
        # From pinned memory the copy to the device does not make the host wait.
        input_ids, labels = input_ids.contiguous().pin_memory(), labels.pin_memory()
    return {"input_ids": input_ids, "labels": labels}


def evaluation_batches(
    stream: TokenStream,
    *,
    sequence_length: int,
    micro_size: int,
    dp_rank: int,
    dp_degree: int,
    max_sequences: int = 0,
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
        max_sequences: read only the first so many; 0 means all.
    """
    total = num_samples(stream.num_tokens, sequence_length)
    if max_sequences:
        total = min(total, max_sequences)
    for start in range(dp_rank * micro_size, _round_up(total, dp_degree * micro_size), dp_degree * micro_size):
        indices = [min(index, total - 1) for index in range(start, start + micro_size)]
        batch = read_sequences(stream, indices, sequence_length)
        num_missing = max(0, start + micro_size - total)
        if num_missing:
            batch["labels"][max(0, micro_size - num_missing) :] = IGNORED_LABEL
        yield batch


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
