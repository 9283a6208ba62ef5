"""How norms add up: the squares of all elements of a gradient that is divided over ranks, each counted once."""

from collections.abc import Sequence

import torch
import torch.distributed as dist

from sharding.parallel_dims import ParallelDims
from sharding.part import Part

GradientPiece = tuple[Part, torch.Tensor]
"""A part of a parameter, and this rank's memory of its gradient or of some of it."""


def square_sum(
    pieces: Sequence[GradientPiece],
    parts: Sequence[Part],
    dims: ParallelDims,
    device: torch.device,
    others: torch.Tensor | None = None,
    others_over: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """Sum of the squares of all elements of the whole gradient, equal on all ranks; every rank must call it.

    Args:
        pieces: this rank's gradients, already summed over micro-batches and ranks, alike on all holders of a part.
        parts: of all trained parameters, also those without a gradient on this rank.
        dims: the ranks.
        device: where the sum is made.
        others: fp64 numbers on the device, [n], that are to travel along: ranks' are added up in place.
        others_over: the ranks over which: ``sums_over`` of a part, where no axis divides the model.

    Returns:
        An fp64 scalar on the device.
    """
    if dims.divides_model:
        # Each rank has parameters that some of the others have as well, and others have not: in the sum over all ranks
        # each square of a part appears once for each of its holders.
        total = _total([_squares([gradient]) / part.holders.degree for part, gradient in pieces], device)
        dist.all_reduce(total)
        return total
    total = torch.zeros((), device=device, dtype=torch.float64)
    # One group as a rule: that over which all parameters are divided, or none.
    for group in dict.fromkeys(part.sums_over for part in parts):
        own = [gradient for part, gradient in pieces if part.sums_over is group]
        squares = _squares(own) if own else torch.zeros((), device=device, dtype=torch.float64)
        if group is not None:
            along = [others] if others is not None and group is others_over else []
            sums = torch.cat([squares.view(1), *along])
            dist.all_reduce(sums, group=group)
            squares = sums[0]
            for sent in along:
                sent.copy_(sums[1:])
        total = total + squares
    return total


def _total(squares: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
    return torch.stack(list(squares)).sum() if squares else torch.zeros((), device=device, dtype=torch.float64)


def _squares(gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """Sum of the squares of all elements, an fp64 scalar.

    A CPU that adds up millions of fp32 squares one after the other loses the fourth digit, which would make the clipped
    step depend on how the gradients are divided. Rows are short enough for fp32, and their norms are added up in fp64.
    """
    if gradients[0].device.type != "cpu":
        return torch.stack(torch._foreach_norm(list(gradients), 2, dtype=torch.float64)).square().sum()
    row_norms = [torch.linalg.vector_norm(gradient, dim=-1).reshape(-1) for gradient in gradients]
    return torch.cat(row_norms).double().square().sum()
