"""Plain values between ranks, over the host: for decisions and reports, not for what a step computes."""

from typing import Any, TypeVar

import torch
import torch.distributed as dist

from sharding.ranks.process_group import Ranks

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


def error_of_rank_0(error: _Value, ranks: Ranks) -> _Value | None:
    """What went wrong on rank 0, on every rank; every rank must call it, and waits for rank 0.

    Nothing has, as a rule, which takes one small collective to tell, where an object takes two.

    Args:
        error: rank 0's; what can be pickled. Others' do not matter.
        ranks: this rank's place.
    """
    has_error = ranks.rank == 0 and error is not None
    return broadcast_object(error, ranks) if sum_integers_over_ranks(int(has_error), ranks) else None


def sum_over_ranks(sums: torch.Tensor, ranks: Ranks) -> list[float]:
    """Add up a vector over all ranks, as numbers; waits for the device."""
    return gather_rows(sums.double().cpu(), ranks).sum(dim=0).tolist()


def gather_rows(row: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """Vectors of all ranks, on the host, in rank order, so that sums over them come out the same everywhere."""
    if ranks.world_size == 1:
        return row[None]
    rows = [torch.empty_like(row) for _ in range(ranks.world_size)]
    dist.all_gather(rows, row)
    return torch.stack(rows)


def sum_integers_over_ranks(value: int, ranks: Ranks) -> int:
    """Add up a signed 64-bit integer over all ranks, wrapping around."""
    total = torch.tensor([value], dtype=torch.int64)
    if ranks.world_size > 1:
        dist.all_reduce(total)
    return int(total.item())
