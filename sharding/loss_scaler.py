"""Dynamic loss scaling for fp16: the scale lives on the device, and nothing here waits for it."""

import math

import torch

from sharding.config import PrecisionConfig
from sharding.parallel_dims import Role
from sharding.part import Part, part_of

_BACKOFF = 0.5
_GROWTH = 2.0


class LossScaler:
    """A scale that halves after a step with a non-finite gradient and doubles after a series of good steps.

    Micikevicius et al., "Mixed Precision Training" (2018), section 3.2. All ranks give ``update`` the same verdict, so
    their scales stay equal without communication.
    """

    def __init__(self, precision: PrecisionConfig, device: torch.device) -> None:
        """Start from the configured scale."""
        self._growth_steps = precision.loss_scale_growth_steps
        self.scale = torch.tensor(precision.initial_loss_scale, dtype=torch.float32, device=device)
        self._good_steps = torch.zeros((), dtype=torch.int32, device=device)

    def update(self, found_nonfinite: torch.Tensor) -> None:
        """Adapt the scale after a step; ``found_nonfinite`` is 1.0 where it was skipped, else 0.0."""
        torch._amp_update_scale_(self.scale, self._good_steps, found_nonfinite, _GROWTH, _BACKOFF, self._growth_steps)
        # A scale below 1 would mean that the unscaled gradients overflow too: no scale helps then.
        self.scale.clamp_(min=1.0)

    def parts(self, holders: Role) -> list[Part]:
        """The scaler's canonical state, live; ``holders`` is this rank's place among all."""
        return [part_of("scaler/scale", self.scale, holders), part_of("scaler/good_steps", self._good_steps, holders)]


def num_halvings(precision: PrecisionConfig) -> int:
    """Steps that fp16 may skip in a row for good reason: each halves the scale, down to 1."""
    return math.ceil(math.log2(precision.initial_loss_scale))
