"""Forward and backward over the micro-batches of a step, as every engine does it."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from sharding.engine import Batch


def on_device(batch: Batch, device: torch.device) -> Batch:
    """A batch whose tensors are on a device; pinned memory is copied while the host goes on."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def accumulate_gradients(
    micro_batches: Sequence[Batch],
    scale: float | torch.Tensor,
    device: torch.device,
    *,
    loss: Callable[[Batch], torch.Tensor],
    backward: Callable[[torch.Tensor], None],
    context: Callable[[bool], AbstractContextManager[Any]],
) -> torch.Tensor:
    """Run forward and backward over micro-batches; gradients add up where the backward pass leaves them.

    Args:
        micro_batches: this rank's, on the host.
        scale: factor of each summed loss before its backward pass.
        device: where this rank computes.
        loss: summed loss of a batch on the device, a scalar.
        backward: runs the backward pass of a scaled loss.
        context: is entered around each pass; called with whether it is the step's last.

    Returns:
        The summed loss over all micro-batches, a scalar on the device.
    """
    total = torch.zeros((), device=device)
    for index, batch in enumerate(micro_batches):
        with context(index == len(micro_batches) - 1):
            loss_sum = loss(on_device(batch, device))
            # Turned into NaN, since a rank-local infinite loss can leave its gradients finite: NaN reaches every rank
            # through the gradient reduction, and all skip the step without another collective.
            factor = torch.where(loss_sum.detach().isfinite(), scale, torch.nan)
            backward(loss_sum * factor)
        total += loss_sum.detach()
    return total
