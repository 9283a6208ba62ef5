"""How a command ends that a person interrupts, or whose reader has gone: with one line or none, and no traceback.

``python -m sharding.ranks.quiet_end MODULE [ARGUMENT ...]`` runs a module so, the seconds in which it imports
its libraries included.
"""

import contextlib
import os
import runpy
import select
import sys
from collections.abc import Iterator

from sharding.ranks.sentences import print_error

EXIT_INTERRUPTED = 130
"""Exit status after Ctrl-C, as a shell says it."""

EXIT_NO_READER = 141
"""Exit status where standard output is no longer read, as a shell says it of ``yes | head``."""


@contextlib.contextmanager
def ends_quietly() -> Iterator[None]:
    """Turn Ctrl-C, and a reader of standard output that has gone, into an exit status.

    Raises:
        SystemExit: one of them happened.
    """
    try:
        try:
            yield
        finally:
            # Here, since what is left for the interpreter's own end is a warning there.
            sys.stdout.flush()
    except KeyboardInterrupt:
        print_error("interrupted")
        raise SystemExit(EXIT_INTERRUPTED) from None
    except BrokenPipeError:
        if not _has_lost_reader():
            raise
        raise SystemExit(EXIT_NO_READER) from None
    except SystemExit as end:
        # rich, too, ends the program there, with a status of its own.
        if isinstance(end.__context__, BrokenPipeError):
            raise SystemExit(EXIT_NO_READER) from None
        raise


def _has_lost_reader() -> bool:
    """Whether it is standard output that broke, and no pipe or socket of ours; what it still holds is dropped then."""
    try:
        descriptor = sys.stdout.fileno()
    except (OSError, ValueError):
        return False
    poll = select.poll()
    poll.register(descriptor, 0)
    # What a pipe says whose last reader has gone.
    if not any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    return True


def main() -> None:
    """Run the module named first as ``python -m`` would, with the rest as its arguments."""
    del sys.argv[0]
    with ends_quietly():
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
