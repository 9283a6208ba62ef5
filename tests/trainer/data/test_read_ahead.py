"""Reading ahead: everything in order, errors in their place, and a thread that sleeps while there is enough."""

import threading
import time
from collections.abc import Iterator
from itertools import count

import pytest

from tests.support import wait_until
from trainer.data import read_ahead
from trainer.data.read_ahead import ReadAhead


class _Counted:
    """0, 1, 2, ..., and how many of them were read; with an error in place of one."""

    def __init__(self, fails_at: int = -1) -> None:
        self.num_read = 0
        self._fails_at = fails_at

    def __iter__(self) -> Iterator[int]:
        for number in count():
            if number == self._fails_at:
                raise OSError("the disk is gone")
            self.num_read += 1
            yield number


@pytest.mark.parametrize("num_ahead", [0, 1, 2, 3, 8])
def test_items_come_in_order(num_ahead: int) -> None:
    reader = ReadAhead(iter(_Counted()), num_ahead)
    assert [reader.next() for _ in range(100)] == list(range(100))
    reader.close()


@pytest.mark.timing
def test_the_thread_reads_again_once_half_is_used_up() -> None:
    numbers = _Counted()
    reader = ReadAhead(iter(numbers), 8)
    wait_until(lambda: numbers.num_read == 8, timeout_s=30, what="8 items")
    assert [reader.next() for _ in range(3)] == [0, 1, 2]
    time.sleep(0.05)
    assert numbers.num_read == 8
    assert reader.next() == 3
    wait_until(lambda: numbers.num_read == 12, timeout_s=30, what="12 items")
    reader.close()


@pytest.mark.parametrize("num_ahead", [0, 1, 8])
def test_an_error_comes_after_the_items_before_it(num_ahead: int) -> None:
    reader = ReadAhead(iter(_Counted(fails_at=3)), num_ahead)
    assert [reader.next() for _ in range(3)] == [0, 1, 2]
    with pytest.raises(OSError, match="the disk is gone"):
        reader.next()
    reader.close()


def test_closing_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_ahead, "CLOSE_WITHIN_S", 0.2)
    answers = threading.Event()
    reader = ReadAhead((answers.wait() for _ in count()), 1)
    closing = threading.Thread(target=reader.close, daemon=True)
    closing.start()
    closing.join(20)
    assert not closing.is_alive()
    answers.set()


@pytest.mark.parametrize("num_ahead", [1, 8])
def test_closing_ends_the_thread(num_ahead: int) -> None:
    before = set(threading.enumerate())
    numbers = _Counted()
    reader = ReadAhead(iter(numbers), num_ahead)
    (thread,) = set(threading.enumerate()) - before
    wait_until(lambda: numbers.num_read == num_ahead, timeout_s=30, what="all items ahead")
    reader.close()
    assert not thread.is_alive()
