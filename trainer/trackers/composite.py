"""All trackers of a run behind a queue: slow ones do not hold up training, and broken ones do not end it."""

import atexit
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from trainer.config import RunConfig
from trainer.trackers.tracker import Tracker
from trainer.trackers.wandb_tracker import WandbTracker

_log = logging.getLogger("shardline")

MAX_WAITING = 1000
FINISH_TIMEOUT_S = 60.0


class Trackers:
    """Feeds trackers from a thread of its own."""

    def __init__(self, trackers: list[Tracker], warn: Callable[[str], None] = _log.warning) -> None:
        """Start the trackers in the background.

        Args:
            trackers: what is fed; one that fails is left out from there on.
            warn: tells a person something that should not be overlooked.
        """
        self._active = list(trackers)
        self._warn = warn
        self._states: dict[str, Any] = {}
        self._waiting: queue.Queue[Callable[[Tracker], None] | None] = queue.Queue(maxsize=MAX_WAITING)
        self._dropped = 0
        self._has_failed = False
        self._thread = threading.Thread(target=self._work, name="trackers", daemon=True)
        self._waiting.put(lambda tracker: tracker.start())
        self._thread.start()

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Hand over one step's metrics; they are dropped, with a warning, where trackers cannot keep up."""
        try:
            self._waiting.put_nowait(lambda tracker: tracker.log(step, metrics))
        except queue.Full:
            self._dropped += 1
            if self._dropped == 1:
                self._warn("trackers cannot keep up; some steps are missing there (metrics.jsonl has them all)")

    def state(self) -> dict[str, Any]:
        """Identities of the trackers' runs, for the checkpoint."""
        return dict(self._states)

    def finish(self, exit_code: int) -> None:
        """Send what is left, within a time limit, and close. The process is to end with this exit code soon after."""
        deadline = time.monotonic() + FINISH_TIMEOUT_S
        try:
            self._waiting.put(lambda tracker: tracker.finish(exit_code), timeout=FINISH_TIMEOUT_S)
            self._waiting.put(None, timeout=max(0.1, deadline - time.monotonic()))
        except queue.Full:
            pass
        self._thread.join(max(0.1, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._warn(f"trackers did not finish within {FINISH_TIMEOUT_S:g} s; what they lack is in metrics.jsonl")
        if self._thread.is_alive() or self._has_failed:
            # wandb waits for its server once more when the interpreter ends, without a limit. Handlers run last in,
            # first out, so this one comes before it.
            atexit.register(os._exit, exit_code)

    def _work(self) -> None:
        while (action := self._waiting.get()) is not None:
            for tracker in list(self._active):
                try:
                    action(tracker)
                    self._states[tracker.name] = tracker.state()
                except BaseException as error:  # noqa: BLE001 - no failure of a tracker may reach training
                    self._active.remove(tracker)
                    self._has_failed = True
                    self._warn(
                        f"{tracker.name} failed and is left out from here on: {str(error) or type(error).__name__}"
                    )


def build_trackers(config: RunConfig, run_dir: Path, warn: Callable[[str], None] = _log.warning) -> Trackers:
    """The configured trackers of a run, started; ``warn`` tells a person what became of one that fails."""
    trackers: list[Tracker] = []
    if config.tracking.wandb.mode != "disabled":
        trackers.append(WandbTracker(config, run_dir, warn))
    return Trackers(trackers, warn)
