"""A thread that reads ahead."""

import threading
from collections import deque
from collections.abc import Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")
CLOSE_WITHIN_S = 5.0


class ReadAhead(Generic[Item]):
    """An endless iterator, read some items ahead by a thread of its own.

    The thread sleeps until half of what it has read is used up. Woken for each item it would compete with every step of
    training for the interpreter and for a core, which costs more than reading a small batch.
    """

    def __init__(self, items: Iterator[Item], num_ahead: int) -> None:
        """Start reading.

        Args:
            items: what is read; from now on the thread's alone.
            num_ahead: items that wait at most; 0 reads on demand, in the caller's thread.
        """
        self._items = items
        self._num_ahead = num_ahead
        self._ready: deque[Item | BaseException] = deque()
        self._changed = threading.Condition()
        self._is_closed = False
        self._thread: threading.Thread | None = None
        if num_ahead:
            self._thread = threading.Thread(target=self._read, name="batch-loader", daemon=True)
            self._thread.start()

    def next(self) -> Item:
        """The next item, or the error that reading it ended in."""
        if self._thread is None:
            return next(self._items)
        with self._changed:
            self._changed.wait_for(lambda: self._ready)
            item = self._ready.popleft()
            if self._is_low():
                self._changed.notify()
        if isinstance(item, BaseException):
            raise item
        return item

    def close(self) -> None:
        """Stop reading ahead.

        A thread that is in the middle of an item, such as one that a hub does not answer for, is left behind after
        ``CLOSE_WITHIN_S``: a rank that fails must get to say so.
        """
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(CLOSE_WITHIN_S)

    def _is_low(self) -> bool:
        return len(self._ready) <= self._num_ahead // 2

    def _read(self) -> None:
        try:
            for item in self._items:
                if not self._put(item):
                    return
        except BaseException as error:  # noqa: BLE001 - the training thread must hear of whatever ends this one
            self._put(error)

    def _put(self, item: Item | BaseException) -> bool:
        """Hand over an item, and wait while there is enough; False once nobody wants more."""
        # At most one side waits: the reader where there is enough, the other where there is nothing.
        with self._changed:
            self._ready.append(item)
            self._changed.notify()
            if len(self._ready) >= self._num_ahead:
                self._changed.wait_for(lambda: self._is_closed or self._is_low())
            return not self._is_closed
