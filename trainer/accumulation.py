"""The one place that knows what a summed loss is divided by, and where ranks agree to stop."""

from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class StepAgreement:
    """What all ranks know before a step.

    Attributes:
        num_targets: valid targets of the global batch, over all ranks and micro-batches: the loss denominator.
        stop: whether any rank was asked to stop.
    """

    num_targets: int
    stop: bool


def agree_on_step(num_local_targets: int, stop: bool) -> StepAgreement:
    """Add up targets and stop flags of all ranks in one all-reduce.

    Both live on the host, so the reduction runs over gloo and never waits for the device.
    """
    counts = torch.tensor([num_local_targets, int(stop)], dtype=torch.int64)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(counts)
    num_targets, num_stops = counts.tolist()
    return StepAgreement(num_targets, num_stops > 0)
