"""What ranks agree on before a step: what a summed loss is divided by, whether to stop, whether a save is written."""

from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class StepAgreement:
    """What all ranks know before a step.

    Attributes:
        num_targets: valid targets of the global batch: the loss denominator.
        num_tokens: tokens of the global batch that the model computes on, with a target or without.
        stop: whether any rank was asked to stop.
        all_have_written: whether every rank is done with writing its part of a checkpoint, well or not.
    """

    num_targets: int
    num_tokens: int
    stop: bool
    all_have_written: bool


def agree_on_step(num_local_targets: int, num_local_tokens: int, stop: bool, has_written: bool) -> StepAgreement:
    """Add up what all ranks have to say in one all-reduce.

    All of it lives on the host, so the reduction runs over gloo and never waits for the device.

    Args:
        num_local_targets: valid targets of this rank's micro-batches; 0 where another rank counts the same ones.
        num_local_tokens: tokens of this rank's micro-batches; 0 likewise.
        stop: whether this rank was asked to stop.
        has_written: whether this rank is done with its part of a checkpoint that waits to be made valid.
    """
    local = [num_local_targets, num_local_tokens, int(stop), int(has_written)]
    counts, num_ranks = torch.tensor(local, dtype=torch.int64), 1
    if dist.is_initialized() and dist.get_world_size() > 1:
        num_ranks = dist.get_world_size()
        dist.all_reduce(counts)
    num_targets, num_tokens, num_stops, num_written = counts.tolist()
    return StepAgreement(num_targets, num_tokens, num_stops > 0, num_written == num_ranks)
