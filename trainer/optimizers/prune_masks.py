"""Masks from weights and gradients, and what they make zero.

Importance is the squared gradient times the squared weight: Molchanov et al., "Importance Estimation for Neural Network
Pruning" (2019), equation 8, of which a mean over steps is taken.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from sharding.part import Part
from sharding.ranks.errors import AgreedError
from sharding.state import MODEL_PREFIX
from trainer.config.prune import BY_GRADIENTS, PruneConfig
from trainer.optimizers.prune_choice import nothing_left, num_pruned
from trainer.optimizers.prune_selection import (
    Scored,
    random_scores,
    smaller_half_of_fours,
    smallest,
    sort_keys,
    sum_over_world,
)

_MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")


@dataclass(frozen=True)
class PruneInputs:
    """What decides which weights go.

    Attributes:
        weights: part of each parameter that is pruned.
        masks: of the same names and shapes, False where a weight is pruned already.
        squares: mean squared gradients, of the same; empty where gradients do not decide.
    """

    weights: Sequence[Part]
    masks: Sequence[torch.Tensor]
    squares: Sequence[torch.Tensor]


def shrink_masks(config: PruneConfig, sparsity: float, inputs: PruneInputs, num_ranks: int) -> None:
    """Prune more weights, in place, until a share of all is pruned; those that are stay so. Every rank must call it.

    Args:
        config: what is compared with what.
        sparsity: the share.
        inputs: what decides; its masks are changed.
        num_ranks: ranks in the default process group.

    Raises:
        AgreedError: there is nothing to judge by, or a parameter would have no weight left; nothing is changed.
    """
    device = inputs.masks[0].device
    if config.by in BY_GRADIENTS:
        has_any = torch.stack([(square > 0).any() for square in inputs.squares]).any().long()
        if not sum_over_world(has_any, num_ranks):
            raise AgreedError(
                f"prune.by={config.by} judges by gradients, but none has come to any of these weights yet; prune after "
                "later steps (prune.begin, prune.end), or set prune.by=magnitude."
            )
    squares: Sequence[torch.Tensor | None] = inputs.squares or [None] * len(inputs.masks)
    scored = [
        Scored(weight, sort_keys(_score(config, weight, square), mask))
        for weight, mask, square in zip(inputs.weights, inputs.masks, squares, strict=True)
    ]
    sizes = [math.prod(weight.global_shape) for weight in inputs.weights]
    if config.pattern == "2:4":
        marked = [smaller_half_of_fours(one) for one in scored]
    elif config.scope == "layer":
        counts = [num_pruned(size, sparsity) for size in sizes]
        marked = [marks for (marks,) in smallest([[one] for one in scored], counts, num_ranks)]
    else:
        (marked,) = smallest([scored], [num_pruned(sum(sizes), sparsity)], num_ranks)
    kept = torch.zeros(len(scored), dtype=torch.int64, device=device)
    for index, (one, mask, mark) in enumerate(zip(scored, inputs.masks, marked, strict=True)):
        if one.part.is_written_here:
            kept[index] = (mask & ~mark).sum()
    for weight, size, left in zip(inputs.weights, sizes, sum_over_world(kept, num_ranks).tolist(), strict=True):
        if not left:
            raise nothing_left(config, weight.name.removeprefix(MODEL_PREFIX), size)
    for mask, mark in zip(inputs.masks, marked, strict=True):
        mask &= ~mark


def clear_pruned(part: Part, masks: Mapping[str, torch.Tensor]) -> None:
    """Make a part of the canonical state zero where a mask has pruned: weights, and moments that lie as they do.

    Args:
        part: of ``model/NAME``, ``ema/NAME`` or ``optimizer/NAME/MOMENT``; others are left alone.
        masks: by the parameter's name.
    """
    kind, _, name = part.name.partition("/")
    if kind == "optimizer":
        name, _, moment = name.rpartition("/")
        if moment not in _MOMENTS:
            return
    mask = masks.get(name)
    if mask is not None and mask.shape == part.tensor.shape:
        part.tensor.masked_fill_(~mask, 0.0)


def _score(config: PruneConfig, weight: Part, square: torch.Tensor | None) -> torch.Tensor:
    if config.by == "random":
        return random_scores(weight)
    if square is None:
        return weight.tensor
    # Roots of the scores have their order, and do not vanish in fp32.
    return square if config.by == "gradient" else square.sqrt() * weight.tensor
