"""The gradient noise scale: how many tokens a batch can have before more of them stop helping.

McCandlish et al., "An Empirical Model of Large-Batch Training" (2018), sections 2.2 and A.1. With the true gradient G
and the covariance C of one token's gradient, a mean over n tokens has the expected squared norm |G|^2 + tr(C) / n.
Norms of small and large batches give both unknowns; their ratio tr(C) / |G|^2 is the simple noise scale, in tokens. The
small batches are the micro-batches that the step consists of in any case, so nothing is computed twice.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sharding.engine import Batch, Engine

_SMOOTHING = 0.9


@dataclass(frozen=True)
class NoiseMeasurement:
    """This rank's part of one step's measurement.

    Attributes:
        square: this rank's addend of the mean of its micro-batches' squared gradient norms, each weighted with its
            tokens: a device scalar, fp64.
        num_micro_batches: this rank's micro-batches with any token.
    """

    square: torch.Tensor
    num_micro_batches: int


def train_and_measure(
    engine: Engine, micro_batches: Sequence[Batch], num_tokens: Sequence[int], denominator: int
) -> tuple[torch.Tensor, NoiseMeasurement]:
    """``engine.train_batch`` with a measurement; every rank must call it.

    Args:
        engine: of any backend but DeepSpeed, which ``validate`` refuses.
        micro_batches: see Engine.
        num_tokens: valid targets of each micro-batch.
        denominator: see Engine.

    Returns:
        What ``train_batch`` returns, and the measurement.
    """
    loss_sum, shares = engine.train_batch_with_norms(micro_batches, denominator)
    # A share is n / N times the micro-batch's mean gradient, and its weight in the mean is n / N as well.
    counts = torch.tensor([max(count, 1) for count in num_tokens], dtype=torch.float64).to(shares.device)
    square = (shares * max(denominator, 1) / counts).sum()
    return loss_sum, NoiseMeasurement(square, sum(count > 0 for count in num_tokens))


class NoiseScale:
    """Moving averages of the two unknowns over measured steps; their ratio is the noise scale."""

    def __init__(self, gradient_square: float = 0.0, variance: float = 0.0) -> None:
        """Start from the averages of a checkpoint, or from nothing.

        Args:
            gradient_square: average of |G|^2.
            variance: average of tr(C), per token.
        """
        self.gradient_square = gradient_square
        self.variance = variance

    def add(self, micro_square: float, num_micro_batches: int, grad_norm: float, num_tokens: int) -> None:
        """Take in one step; one that is not finite, or has fewer than two micro-batches with tokens, is skipped.

        With M micro-batches of N tokens in all, and weights n_i / N, E[micro_square] = |G|^2 + tr(C) M / N and
        E[grad_norm^2] = |G|^2 + tr(C) / N, however the tokens are divided.

        Args:
            micro_square: token-weighted mean of the micro-batches' squared gradient norms, over all ranks.
            num_micro_batches: micro-batches with any token, over all ranks.
            grad_norm: norm of the whole batch's gradient, before clipping.
            num_tokens: valid targets of the whole batch.
        """
        if num_micro_batches < 2 or not math.isfinite(micro_square + grad_norm):
            return
        square = grad_norm**2
        variance = num_tokens * (micro_square - square) / (num_micro_batches - 1)
        gradient_square = (num_micro_batches * square - micro_square) / (num_micro_batches - 1)
        # Both averages lack the same factor at the start, which their ratio does not have.
        self.variance = _SMOOTHING * self.variance + (1.0 - _SMOOTHING) * variance
        self.gradient_square = _SMOOTHING * self.gradient_square + (1.0 - _SMOOTHING) * gradient_square

    @property
    def tokens(self) -> float | None:
        """tr(C) / |G|^2 in tokens; None while an estimate is not positive, which noise can make of either."""
        if self.gradient_square <= 0.0 or self.variance <= 0.0:
            return None
        return self.variance / self.gradient_square
