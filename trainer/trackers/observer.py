"""Code of the user's own that is told of a run while it trains."""

import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from sharding.ranks.errors import UserError
from trainer.files.storage import CheckpointPath
from trainer.metrics.file import Metrics

_log = logging.getLogger("shardline")

_METHODS = ("on_step", "on_evaluate", "on_save")


class Observer(Protocol):
    """Is told of a run on rank 0, in the thread that trains; inherit from it and override what is of interest.

    All that it is told is known anyway, so that it costs no host sync; but training waits until it returns. One that
    raises is left out from there on, which a warning says, and training goes on. After a run has rolled back, steps
    come again.
    """

    def on_step(self, step: int, metrics: Metrics) -> None:
        """A step was logged, as every ``metrics.every_steps`` is and every one with an evaluation.

        Args:
            step: finished steps.
            metrics: the step's line of metrics.jsonl: None where a value is not finite or not known.
        """

    def on_evaluate(self, step: int, metrics: Metrics) -> None:
        """The weights after a step were evaluated; ``metrics`` are those of its line that begin with ``eval/``."""

    def on_save(self, step: int, folder: CheckpointPath) -> None:
        """The checkpoint after a step is complete, which with asynchronous writing is some steps later.

        Args:
            step: the checkpoint's.
            folder: where it lies; a ``Path`` unless ``checkpoint.storage`` is a URL.
        """


def check_observers(observers: Sequence[Observer]) -> None:
    """Assert that each could be told something.

    Raises:
        UserError: one could not.
    """
    for observer in observers:
        if isinstance(observer, type):
            name = observer.__name__
            raise UserError(f"observers has the class {name}, and no object of it; write {name}().")
        if not any(hasattr(observer, method) for method in _METHODS):
            raise UserError(
                f"observers has a {type(observer).__name__}, which would never hear of anything: it has none of "
                f"{', '.join(_METHODS)}; inherit from Observer, and override one."
            )


class OwnObservers:
    """The user's own observers of a run, each until it fails."""

    def __init__(self, observers: Sequence[Observer], warn: Callable[[str], None]) -> None:
        """Take them; ``warn`` tells a person what became of one that fails."""
        self._observers = list(observers)
        self._warn = warn

    def tell(self, method: str, step: int, news: Any) -> None:
        """Call a method of each that has it."""
        for observer in list(self._observers):
            heard = getattr(observer, method, None)
            try:
                if heard is not None:
                    heard(step, news)
            except Exception as error:  # noqa: BLE001 - on one rank alone, no failure of it may end training
                self._observers.remove(observer)
                _log.info("an observer failed", exc_info=True)
                self._warn(
                    f"observer {type(observer).__name__} failed in {method} after step {step} and is left out from "
                    f"here on: {type(error).__name__}: {error}"
                )
