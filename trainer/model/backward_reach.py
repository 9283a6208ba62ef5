"""How far back through a model its backward pass goes: not beyond the first thing that is trained."""

from dataclasses import dataclass

from torch import nn

from sharding.blocks import find_blocks


@dataclass(frozen=True)
class BackwardReach:
    """Which parts of a model have gradients of their activations.

    Parts are what comes before the blocks, each block, and what comes after them, in the order in which modules are
    registered. A part is taken as a whole: of the first one that is trained, backward may need less.

    Attributes:
        first: index of the first block with a gradient; 0 also where what comes before is trained, and the number of
            blocks where only what comes after them is.
        num_blocks: all blocks.
    """

    first: int
    num_blocks: int

    @property
    def num_reached(self) -> int:
        """Blocks that backward goes through."""
        return self.num_blocks - self.first


def backward_reach(model: nn.Module) -> BackwardReach:
    """See BackwardReach; the model may be on the meta device, but must not be sharded yet."""
    blocks = find_blocks(model)
    block_of = {id(p): index for index, (_, block) in enumerate(blocks) for p in block.parameters()}
    num_seen = 0
    first = len(blocks)
    for parameter in model.parameters():
        index = block_of.get(id(parameter))
        num_seen = num_seen if index is None else index + 1
        if parameter.requires_grad:
            # What is in no block comes before the next one.
            first = min(first, num_seen if index is None else index)
    return BackwardReach(first, len(blocks))
