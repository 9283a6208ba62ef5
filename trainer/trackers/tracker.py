"""What an experiment tracker can do."""

from collections.abc import Mapping
from typing import Any, Protocol


class Tracker(Protocol):
    """One tracker of one run; used by one thread at a time, and allowed to fail."""

    name: str

    def start(self, step: int) -> None:
        """Open the tracker's run, the same one in every attempt.

        Args:
            step: finished steps before this attempt; later ones are logged anew.
        """

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Take one step's metrics.

        Every attempt calls this for every line of metrics.jsonl, in order and from the first: the tracker passes over
        the steps that it has already. A value is None where it is not known or not finite.
        """

    def finish(self, exit_code: int, summary: Mapping[str, Any]) -> None:
        """Send what is left and close.

        Args:
            exit_code: how the attempt ended.
            summary: final values of the run, see ``trainer.trackers.summary``.
        """

    def state(self) -> dict[str, Any]:
        """What identifies the tracker's run, for the checkpoint; empty where that is not known yet; any thread asks."""
