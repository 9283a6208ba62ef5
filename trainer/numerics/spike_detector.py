"""Spikes of loss and gradient norm: a step's values against the median and spread of the steps before it."""

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median
from typing import Literal

# The standard deviation of a normal distribution in median absolute deviations.
_DEVIATION_OF_MAD = 1.4826
# Long enough for a median that one step does not move, and short beside what a loss takes to fall.
_BLOCK_STEPS = 32
# A loss that hardly moves has a spread of nearly nothing, and any wiggle would be far out: below half a percent of the
# median, or of the norm, a spread does not count as smaller.
_LEAST_SPREAD = 0.005
_LEAST_NORM = 1e-30


@dataclass(frozen=True)
class Spike:
    """A value far above the recent ones.

    Attributes:
        quantity: what it is a value of.
        value: the value.
        median: median of the latest values.
        scale: robust standard deviation of the recent ones; of a gradient norm, that of its natural logarithm.
        deviations: how many of these the value is above the median; of a loss fewer where its logarithm is less far
            out.
    """

    quantity: Literal["loss", "grad_norm"]
    value: float
    median: float
    scale: float
    deviations: float


class SpikeDetector:
    """Judges each step by the steps that were taken before it.

    A value is a spike where it is more than ``threshold`` robust standard deviations above the median of the latest 32:
    Hampel's identifier, with 1.4826 times the median absolute deviation in place of the standard deviation (Davies and
    Gather, "The Identification of Multiple Outliers" (1993)), which a spike inside the window does not inflate. The
    deviations are those of the whole window, each from the median of its own 32 steps, so that a loss that falls fast
    is not taken for one that scatters. Norms are compared by logarithm, since they vary in proportion. So does a loss
    near zero, as of a classification whose steps have few rows, one of them wrong now and then: a loss above zero must
    be as far out by its logarithm, too, which where losses scatter little beside their level is the same. Threshold,
    window and warm-up have the values that OLMo-core's ``SkipStepOptimizer`` uses with mean and standard deviation.
    """

    def __init__(
        self,
        threshold: float,
        window_steps: int,
        warmup_steps: int,
        losses: Iterable[float] = (),
        grad_norms: Iterable[float] = (),
    ) -> None:
        """Start from the values of a checkpoint, or from none.

        Args:
            threshold: largest distance from the median that is no spike, in robust standard deviations.
            window_steps: steps that are compared with.
            warmup_steps: steps that must be in the window before anything is judged.
            losses: recent mean losses in nats per target, oldest first; of more than ``window_steps`` the latest count.
            grad_norms: global gradient norms before clipping, of the same steps.
        """
        self._threshold = threshold
        self._warmup_steps = warmup_steps
        self._losses = deque(losses, maxlen=window_steps)
        self._grad_norms = deque(grad_norms, maxlen=window_steps)
        # Logarithms of both, which each judgement needs of all.
        self._log_losses = deque(map(_logarithm, self._losses), maxlen=window_steps)
        self._log_grad_norms = deque(map(_logarithm, self._grad_norms), maxlen=window_steps)

    @property
    def losses(self) -> list[float]:
        """The window's losses, oldest first."""
        return list(self._losses)

    @property
    def grad_norms(self) -> list[float]:
        """The window's gradient norms, oldest first."""
        return list(self._grad_norms)

    def judge(self, loss: float, grad_norm: float) -> Spike | None:
        """The spike that a step is, by whichever value is farther out; None for an ordinary step.

        Args:
            loss: the step's mean loss in nats per target, finite.
            grad_norm: its global gradient norm before clipping; left out of account where it is not finite, as it
                may be under fp16.
        """
        if len(self._losses) < self._warmup_steps:
            return None
        middle, scale = _level_and_scale(self._losses)
        scale = max(scale, _LEAST_SPREAD * abs(middle), _LEAST_NORM)
        deviations = (loss - middle) / scale
        if min(loss, *self._losses) > 0:
            deviations = min(deviations, _by_logarithm(loss, self._log_losses)[2])
        spikes = [Spike("loss", loss, middle, scale, deviations)]
        if math.isfinite(grad_norm):
            middle, scale, deviations = _by_logarithm(grad_norm, self._log_grad_norms)
            spikes.append(Spike("grad_norm", grad_norm, math.exp(middle), scale, deviations))
        worst = max(spikes, key=lambda spike: spike.deviations)
        return worst if worst.deviations > self._threshold else None

    def accept(self, loss: float, grad_norm: float) -> None:
        """Compare later steps with this one as well: its update was applied."""
        self._losses.append(loss)
        self._grad_norms.append(grad_norm)
        self._log_losses.append(_logarithm(loss))
        self._log_grad_norms.append(_logarithm(grad_norm))


def _level_and_scale(values: Iterable[float]) -> tuple[float, float]:
    """Median of the latest values, and robust standard deviation of all from the medians of their blocks."""
    values = list(values)
    level, deviations = 0.0, list[float]()
    for end in range(len(values) % _BLOCK_STEPS or _BLOCK_STEPS, len(values) + 1, _BLOCK_STEPS):
        block = values[max(0, end - _BLOCK_STEPS) : end]
        level = median(block)
        deviations += [abs(value - level) for value in block]
    return level, _DEVIATION_OF_MAD * median(deviations)


def _by_logarithm(value: float, logarithms: Iterable[float]) -> tuple[float, float, float]:
    """Level and spread of logarithms, and how many spreads that of another value is above the level."""
    middle, scale = _level_and_scale(logarithms)
    scale = max(scale, _LEAST_SPREAD)
    return middle, scale, (_logarithm(value) - middle) / scale


def _logarithm(value: float) -> float:
    return math.log(max(value, _LEAST_NORM))
