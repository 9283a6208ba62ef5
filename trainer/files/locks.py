"""Holding a file's lock, which the kernel gives up for us however we end."""

import contextlib
import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path

_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)


@contextlib.contextmanager
def exclusive(path: Path, *, on_wait: Callable[[], None] = lambda: None, is_required: bool = True) -> Iterator[None]:
    """Hold a lock file, so that two processes never both see what it guards as free.

    Args:
        path: the lock file; it is made, and stays.
        on_wait: called before waiting for another holder.
        is_required: false goes on without a lock where a file system, as some of clusters, is mounted without locks;
            the caller then has another guard.

    Raises:
        OSError: the file cannot be made or locked.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                on_wait()
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            if is_required or error.errno not in _NO_LOCKS:
                raise
        yield
    finally:
        os.close(descriptor)
