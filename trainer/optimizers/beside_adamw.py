"""The base of our own optimizers: one for some parameters, with torch's fused AdamW for the rest."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from sharding.part import Part


class BesideAdamW(torch.optim.Optimizer):
    """Two optimizers that look like one: parameter groups and state of both are in the same place.

    A subclass implements ``update``. It may overwrite gradients.
    """

    found_inf: torch.Tensor | None = None
    """A scalar on the device; where it is 1, a step changes nothing."""

    grad_scale: torch.Tensor | None = None
    """A scalar on the device that a step divides gradients by; None for gradients that are as they should be."""

    _step_supports_amp_scaling = True

    def __init__(
        self,
        groups: list[dict[str, Any]],
        parameters: Sequence[Part],
        rest: torch.optim.AdamW | None,
        lr: float,
    ) -> None:
        """Take over the parameters.

        Args:
            groups: parameters of this optimizer, with their weight decay.
            parameters: what is known about those parameters.
            rest: the optimizer of all others.
            lr: learning rate.
        """
        super().__init__(groups, {"lr": lr})
        self._parts = {parameter.tensor: parameter for parameter in parameters}
        self._own_groups = list(self.param_groups)
        self._rest = rest
        if rest is not None:
            self.param_groups.extend(rest.param_groups)
            rest.state = self.state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all parameters that have gradients, unless ``found_inf`` says not to."""
        if self._rest is not None:
            self._rest.found_inf = self.found_inf  # type: ignore[attr-defined]
            self._rest.grad_scale = self.grad_scale  # type: ignore[attr-defined]
            self._rest.step()
        members = [(group, p) for group in self._own_groups for p in group["params"] if p.grad is not None]
        if members:
            device = members[0][1].device
            flag = torch.zeros((), device=device) if self.found_inf is None else self.found_inf
            self.update(members, flag > 0, self.grad_scale)

    def update(
        self, members: list[tuple[dict[str, Any], nn.Parameter]], skips: torch.Tensor, divisor: torch.Tensor | None
    ) -> None:
        """Update this optimizer's own parameters.

        Args:
            members: parameters with gradients, each with its group; the same on every rank.
            skips: a boolean scalar on the device; where it is true, parameters and state must stay as they are.
            divisor: a scalar on the device that gradients are to be divided by; None where they are not.
        """
        raise NotImplementedError
