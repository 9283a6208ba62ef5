"""What an experiment tracker can do."""

from collections.abc import Mapping
from typing import Any, Protocol


class Tracker(Protocol):
    """One tracker of one run; used by one thread at a time, and allowed to fail."""

    name: str

    def start(self) -> None:
        """Open the tracker's run, the same one in every attempt."""

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Send one step's metrics."""

    def finish(self, exit_code: int) -> None:
        """Send what is left and close."""

    def state(self) -> dict[str, Any]:
        """What identifies the tracker's run, for the checkpoint."""
