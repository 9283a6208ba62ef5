"""Plain values between ranks, over the host: for decisions and reports, not for what a step computes."""

from typing import Any, TypeVar

import torch.distributed as dist

from sharding.process_group import Ranks

_Value = TypeVar("_Value")


def gather_objects(value: _Value, ranks: Ranks) -> list[_Value]:
    """Every rank's value, by rank; every rank must call it.

    Args:
        value: this rank's; what can be pickled.
        ranks: this rank's place.
    """
    if ranks.world_size == 1:
        return [value]
    values: list[Any] = [None] * ranks.world_size
    dist.all_gather_object(values, value)
    return values


def broadcast_object(value: _Value, ranks: Ranks) -> _Value:
    """Rank 0's value; every rank must call it.

    Args:
        value: rank 0's; what can be pickled. Others' do not matter.
        ranks: this rank's place.
    """
    values = [value]
    if ranks.world_size > 1:
        dist.broadcast_object_list(values, src=0)
    return values[0]
