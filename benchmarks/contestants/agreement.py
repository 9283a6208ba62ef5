"""Whether contestants do the same work: their losses and gradient norms beside those of the plain loop."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from benchmarks.contestants.contest import StepLog

_GROWS_AFTER_STEP = 20
_TENFOLD_IN_STEPS = 10
_LAST_STEP = 100


@dataclass(frozen=True)
class Tolerance:
    """Relative differences that are rounding.

    Attributes:
        loss: of a loss in the first steps.
        grad_norm: of a gradient norm there.
        most_loss: of a loss in any step.
        most_grad_norm: of a gradient norm in any step; a gradient that is twice as large is never rounding.
    """

    loss: float
    grad_norm: float
    most_loss: float = 0.2
    most_grad_norm: float = 0.8

    def at(self, step: int) -> tuple[float, float]:
        """What loss and gradient norm of a step may differ by.

        Adam turns rounding of gradients that are nearly zero into other steps, and these into more: measured losses
        were within 1e-6 at step 20, and ten times as far apart each ten steps later, until they are two trainings of
        the same run. So later steps show less, and those after the hundredth nothing.
        """
        if step > _LAST_STEP:
            return float("inf"), float("inf")
        growth = 10.0 ** max(0.0, (step - _GROWS_AFTER_STEP) / _TENFOLD_IN_STEPS)
        return min(growth * self.loss, self.most_loss), min(growth * self.grad_norm, self.most_grad_norm)


TOLERANCES = {torch.float32: Tolerance(1e-4, 1e-3), torch.bfloat16: Tolerance(1e-2, 5e-2)}
"""By the format of matrix products."""


@dataclass(frozen=True)
class Agreement:
    """One contestant beside the plain loop.

    Attributes:
        loss_differences: relative, by logged step.
        norm_differences: the same of gradient norms.
        complaint: why the contestant does other work; empty where it does the same.
    """

    loss_differences: dict[int, float]
    norm_differences: dict[int, float]
    complaint: str


def agreement(
    name: str, log: StepLog, losses: Sequence[float], norms: Sequence[float], dtype: torch.dtype
) -> Agreement:
    """Compare what a contestant has logged with the plain loop's figures of the same steps.

    Args:
        name: the contestant's.
        log: what it logged.
        losses: the plain loop's mean loss of each step, from the first.
        norms: its gradient norms.
        dtype: format of matrix products.
    """
    expected = {step: _mean(losses[step - log.averaged_over : step]) for step in log.losses}
    loss_differences = _differences(log.losses, expected)
    norm_differences = _differences(log.grad_norms, {step: norms[step - 1] for step in log.grad_norms})
    if not loss_differences or loss_differences.keys() != norm_differences.keys():
        return Agreement(loss_differences, norm_differences, f"{name} has not logged loss and gradient norm of a step")
    for step in loss_differences:
        allowed = TOLERANCES[dtype].at(step)
        for what, found, reference, differences, most in (
            ("loss", log.losses, expected, loss_differences, allowed[0]),
            ("gradient norm", log.grad_norms, {step: norms[step - 1]}, norm_differences, allowed[1]),
        ):
            # What is not a number is not within it either.
            if not differences[step] <= most:
                return Agreement(
                    loss_differences,
                    norm_differences,
                    f"{name} does other work than the plain loop: its {what} of step {step} is {found[step]}, the "
                    f"plain loop's {reference[step]}; they may differ by {most:.0e}, relative",
                )
    return Agreement(loss_differences, norm_differences, "")


def _differences(found: Mapping[int, float], expected: Mapping[int, float]) -> dict[int, float]:
    return {step: abs(found[step] - expected[step]) / abs(expected[step]) for step in found}


def _mean(values: Iterable[float]) -> float:
    return float(torch.tensor(list(values), dtype=torch.float64).mean())
