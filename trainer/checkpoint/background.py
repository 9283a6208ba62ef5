"""A rank's write of its part of a checkpoint, in a thread beside training."""

import contextlib
import os
import sys
import threading
from collections.abc import Callable

from trainer.checkpoint.rank_file import RankReport

_LOWEST_PRIORITY = 19


class BackgroundWrite:
    """Runs in a thread from the moment it is made."""

    def __init__(self, write: Callable[[], RankReport]) -> None:
        """Start writing; ``write`` raises nothing."""
        self._write = write
        self._report: RankReport | None = None
        # Does not keep a process alive that has failed meanwhile: what it writes has no manifest.
        self._thread = threading.Thread(target=self._run, name="checkpoint-writer", daemon=True)
        self._thread.start()

    @property
    def has_ended(self) -> bool:
        """Whether the write is over, well or not."""
        return self._report is not None

    def wait(self) -> RankReport:
        """Wait until it is over."""
        self._thread.join()
        assert self._report is not None
        return self._report

    def _run(self) -> None:
        if sys.platform == "linux":
            # Training comes first where no core is free; Linux keeps priorities by thread.
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST_PRIORITY)
        self._report = self._write()
