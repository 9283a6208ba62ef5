"""What blocks of a model give out, looked at from outside."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from sharding.blocks import find_blocks
from sharding.ranks.errors import UserError


def block_at(model: nn.Module, number: int, whose: str) -> nn.Module:
    """A block of a model by its number, from the end if negative.

    Args:
        model: the model.
        number: of the block.
        whose: subject of the sentence that refuses it.

    Raises:
        UserError: there is none.
    """
    blocks = find_blocks(model)
    if not -len(blocks) <= number < len(blocks):
        raise UserError(
            f"distill.layers names block {number}, but {whose} {len(blocks)} blocks; count them from 0, or from the "
            "end by negative numbers."
        )
    return blocks[number][1]


def _as_it_is(_: int, state: torch.Tensor) -> torch.Tensor:
    return state


@contextmanager
def recorded(
    blocks: Sequence[nn.Module], change: Callable[[int, torch.Tensor], torch.Tensor] = _as_it_is
) -> Iterator[Callable[[], list[torch.Tensor]]]:
    """Within, what blocks give out is kept; what is yielded returns it, in the order of the blocks.

    Hooks come with each pass and go with it: they are the last, so that what backends do to a block's output is done,
    and what is recomputed in the backward pass is not taken for another one.

    Args:
        blocks: of one model.
        change: called within the model's forward pass with the place of a block among these and its output; what it
            returns is kept in place of that.
    """
    states: dict[int, torch.Tensor] = {}

    def keep(place: int) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            first = output if isinstance(output, torch.Tensor) else next(iter(output))
            states[place] = change(place, first)

        return hook

    handles = [block.register_forward_hook(keep(place)) for place, block in enumerate(blocks)]
    try:
        yield lambda: [states[place] for place in range(len(blocks))]
    finally:
        for handle in handles:
            handle.remove()
