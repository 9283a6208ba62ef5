"""All trackers of a run, each in a thread of its own: slow ones do not hold up training, broken ones do not end it."""

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from trainer.config import RunConfig
from trainer.metrics.best import better_direction
from trainer.metrics.goodput import read_goodput
from trainer.trackers.summary import RunSummary
from trainer.trackers.tensorboard_tracker import TensorBoardTracker
from trainer.trackers.tracker import Tracker
from trainer.trackers.trackio_tracker import TrackioTracker
from trainer.trackers.wandb_tracker import WandbTracker

_log = logging.getLogger("shardline")

FINISH_TIMEOUT_S = 60.0


class Follower:
    """Feeds one tracker the lines of metrics.jsonl, from the first one on.

    The file has every logged step once and in order, whatever ended earlier attempts; so a tracker that lost lines
    when a process was killed gets them here again, and none has to be kept in memory for a slow tracker.
    """

    def __init__(self, tracker: Tracker, metrics_path: Path, warn: Callable[[str], None], monitor: str) -> None:
        """Plan the work; nothing happens yet."""
        self.tracker = tracker
        self.has_failed = False
        self._path = metrics_path
        self._warn = warn
        self._summary = RunSummary(monitor)
        self._has_news = threading.Event()
        self._exit_code: int | None = None
        self._thread: threading.Thread | None = None

    def start(self, step: int) -> None:
        """Begin in the background; the file must be there, without lines beyond this step."""
        # What earlier attempts logged.
        self._has_news.set()
        self._thread = threading.Thread(
            target=self._work, args=(step,), name=f"tracker-{self.tracker.name}", daemon=True
        )
        self._thread.start()

    def announce(self) -> None:
        """A line was added."""
        self._has_news.set()

    def finish(self, exit_code: int) -> None:
        """Nothing more will be added."""
        self._exit_code = exit_code
        self._has_news.set()

    def join(self, timeout_s: float) -> bool:
        """Wait until all is sent and closed; whether it is."""
        if self._thread is None:
            return True
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _work(self, step: int) -> None:
        try:
            self.tracker.start(step)
            for line_step, metrics in self._lines():
                self._summary.add(line_step, metrics)
                self.tracker.log(line_step, metrics)
            assert self._exit_code is not None
            goodput = read_goodput(self._path.parent)
            better = better_direction(self._path.parent, self._summary.monitor)
            summary = self._summary.values(self._exit_code, better) | (
                goodput.fractions() if goodput is not None else {}
            )
            self.tracker.finish(self._exit_code, summary)
        except BaseException as error:  # noqa: BLE001 - no failure of a tracker may reach training
            self.has_failed = True
            reason = str(error) or type(error).__name__
            self._warn(f"{self.tracker.name} failed and is left out from here on: {reason}")

    def _lines(self) -> Iterator[tuple[int, dict[str, Any]]]:
        while True:
            with self._path.open() as file:
                line = ""
                while self._is_in_place(file):
                    self._has_news.wait()
                    # In this order, so that no news is missed.
                    self._has_news.clear()
                    is_over = self._exit_code is not None
                    for piece in file:
                        line += piece
                        # Half a line may be there before it is announced.
                        if line.endswith("\n"):
                            values, line = json.loads(line), ""
                            yield int(values.pop("step")), values
                    if is_over and self._is_in_place(file):
                        return
            # All of it is news; a tracker knows which steps it has.
            self._has_news.set()

    def _is_in_place(self, file: TextIO) -> bool:
        """Whether the file is still the one with that name: a run that rolls back puts another one there."""
        try:
            return os.path.samestat(os.fstat(file.fileno()), self._path.stat())
        except FileNotFoundError:
            return True


class Trackers:
    """The trackers of a run."""

    def __init__(
        self,
        trackers: list[Tracker],
        metrics_path: Path,
        warn: Callable[[str], None] = _log.warning,
        monitor: str = "loss",
    ) -> None:
        """Plan the work; nothing happens before ``start``.

        Args:
            trackers: what is fed; one that fails is left out from there on.
            metrics_path: metrics.jsonl.
            warn: tells a person something that should not be overlooked.
            monitor: the metric of the evaluation that the summary is by, without ``eval/``.
        """
        self._followers = [Follower(tracker, metrics_path, warn, monitor) for tracker in trackers]
        self._warn = warn
        self._is_started = False

    def start(self, step: int) -> None:
        """Open the trackers in the background; metrics.jsonl must end with this step or before."""
        self._is_started = True
        for follower in self._followers:
            follower.start(step)

    def announce(self) -> None:
        """A line was added to metrics.jsonl."""
        for follower in self._followers:
            follower.announce()

    def state(self) -> dict[str, Any]:
        """Identities of the trackers' runs, for the checkpoint."""
        if not self._is_started:
            return {}
        return {f.tracker.name: state for f in self._followers if (state := f.tracker.state())}

    def finish(self, exit_code: int) -> None:
        """Send what is left, within a time limit, and close.

        The process should end by ``end_process`` then: wandb waits for its server once more, within a limit of its own,
        when the interpreter ends.
        """
        if not self._is_started:
            return
        for follower in self._followers:
            follower.finish(exit_code)
        deadline = time.monotonic() + FINISH_TIMEOUT_S
        late = [f.tracker.name for f in self._followers if not f.join(max(0.1, deadline - time.monotonic()))]
        if late:
            self._warn(
                f"{' and '.join(late)} did not finish within {FINISH_TIMEOUT_S:g} s; what is lacking there is in "
                "metrics.jsonl"
            )


def build_trackers(
    config: RunConfig, run_dir: Path, metrics_path: Path, warn: Callable[[str], None] = _log.warning
) -> Trackers:
    """The configured trackers of a run; ``warn`` tells a person what became of one that fails."""
    trackers: list[Tracker] = []
    if config.tracking.wandb.mode != "disabled":
        trackers.append(WandbTracker(config, run_dir, warn))
    if config.tracking.tensorboard.enabled:
        trackers.append(TensorBoardTracker(config, run_dir))
    if config.tracking.trackio.enabled:
        trackers.append(TrackioTracker(config, run_dir))
    return Trackers(trackers, metrics_path, warn, config.evaluation.monitor)
