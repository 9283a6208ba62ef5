"""An exponential moving average of the weights, kept beside the fp32 masters and divided over ranks as they are."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from sharding.batch_norm import RUNNING_STATISTICS
from sharding.engine import Engine
from sharding.part import Part
from sharding.state import AVERAGE_PREFIX, MODEL_PREFIX


class WeightAverage:
    """``average = decay * average + (1 - decay) * weights`` after every step that changed the weights.

    The running statistics of batch normalisation are averaged as the weights are: those of the weights themselves
    would describe activations that averaged weights do not have.

    Polyak and Juditsky, "Acceleration of Stochastic Approximation by Averaging" (1992), in its exponential form.
    """

    def __init__(self, engine: Engine, decay: float) -> None:
        """Begin with the engine's present weights.

        Args:
            engine: holds the weights; its parts must stay where they are in memory.
            decay: share of the old average that stays, below 1.
        """
        self._engine = engine
        self._decay = decay
        # What is frozen is its own average.
        trained = {name for name, parameter in engine.named_parameters() if parameter.requires_grad}
        masters = engine.state(with_optimizer=False)
        masters = [
            part
            for part in masters
            if part.name.removeprefix(MODEL_PREFIX) in trained or part.name.endswith(RUNNING_STATISTICS)
        ]
        self._masters = [part.tensor for part in masters]
        self._averages = {
            part.name: replace(part, name=_average_name(part.name), tensor=part.tensor.clone()) for part in masters
        }

    def state(self) -> list[Part]:
        """This rank's parts of the average, ``ema/PARAMETER``; the tensors are live."""
        return list(self._averages.values())

    def load(self, read: Callable[[Part], None] | None) -> None:
        """Let ``read`` fill the average in place; with None it begins anew with the present weights."""
        for average, master in zip(self.state(), self._masters, strict=True):
            if read is None:
                average.tensor.copy_(master)
            else:
                read(average)

    def update(self, stepped: torch.Tensor) -> None:
        """Move towards the weights; ``stepped`` is 1.0 where the step changed them and 0.0 where it was skipped.

        It is used on the device as a factor, so nothing waits for it.
        """
        averages = [part.tensor for part in self.state()]
        if averages:
            weight = ((1.0 - self._decay) * stepped).to(averages[0].device, averages[0].dtype)
            torch._foreach_lerp_(averages, self._masters, [weight] * len(averages))

    @contextmanager
    def in_place_of_weights(self) -> Iterator[None]:
        """Exchange weights and average, and exchange them back; needs the memory of one slice more."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        # By way of the engine, which may have to tell copies in another format of the new masters.
        self._engine.load_state(self._exchange_part, with_optimizer=False)

    def _exchange_part(self, part: Part) -> None:
        average = self._averages.get(part.name)
        if average is not None:
            weights = part.tensor.clone()
            part.tensor.copy_(average.tensor)
            average.tensor.copy_(weights)


def _average_name(name: str) -> str:
    return AVERAGE_PREFIX + name.removeprefix(MODEL_PREFIX)
