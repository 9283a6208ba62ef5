"""A thread that reads ahead."""

import contextlib
import queue
import threading
from collections.abc import Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")


class ReadAhead(Generic[Item]):
    """An endless iterator, read some items ahead by a thread of its own."""

    def __init__(self, items: Iterator[Item], num_ahead: int) -> None:
        """Start reading.

        Args:
            items: what is read; from now on the thread's alone.
            num_ahead: items that wait at most; 0 reads on demand, in the caller's thread.
        """
        self._items = items
        self._queue: queue.Queue[Item | BaseException] | None = None
        self._closed = threading.Event()
        if num_ahead:
            self._queue = queue.Queue(maxsize=num_ahead)
            self._thread = threading.Thread(target=self._fill_queue, name="batch-loader", daemon=True)
            self._thread.start()

    def next(self) -> Item:
        """The next item, or the error that reading it ended in."""
        if self._queue is None:
            return next(self._items)
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
        try:
            for item in self._items:
                if not self._put(item):
                    return
        except BaseException as error:  # noqa: BLE001 - the training thread must hear of whatever ends this one
            self._put(error)

    def _put(self, item: Item | BaseException) -> bool:
        assert self._queue is not None
        while not self._closed.is_set():
            with contextlib.suppress(queue.Full):
                self._queue.put(item, timeout=0.1)
                return True
        return False
