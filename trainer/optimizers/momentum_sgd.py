"""torch's SGD, safe where the very first step is skipped."""

from collections.abc import Callable
from typing import Any

import torch


class MomentumSGD(torch.optim.SGD):
    """SGD whose momentum is zero before the first step.

    torch creates it in the first step and fills it in the kernel; a fused kernel that is told to skip leaves there what
    was in memory before. From zero the first step is the same bit for bit.
    """

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One step."""
        for group in self.param_groups:
            for parameter in group["params"] if group["momentum"] else ():
                state = self.state[parameter]
                if parameter.grad is not None and state.get("momentum_buffer") is None:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
        return super().step(closure)
