"""Learning rates by depth: what lies near the inputs of a trained model is changed less than what lies near the loss.

Howard and Ruder, "Universal Language Model Fine-tuning for Text Classification" (2018), section 3.2; in the form of
Clark et al., "ELECTRA" (2020), one factor for each block.
"""

from torch import nn

from sharding.blocks import find_blocks
from sharding.ranks.errors import UserError


def depth_scales(model: nn.Module, decay: float) -> dict[str, float]:
    """Factor to the learning rate of each trained parameter, by its name.

    Of n blocks the i-th, from 0, has ``decay ** (n - i)``. Embeddings and what is registered before the first block
    have ``decay ** (n + 1)``, what is between two blocks is as deep as the later one, and what is behind all has 1.

    Args:
        model: the model, before it is sharded.
        decay: factor from one block to the one before it; 1 leaves the rates alone, and nothing is returned.

    Raises:
        UserError: the model has no blocks.
    """
    if decay == 1.0:
        return {}
    blocks = find_blocks(model)
    if not blocks:
        raise UserError(
            f"optimizer.layer_decay={decay:g} is a factor from each repeated block to the one before it, but this "
            f"{type(model).__name__} has none; remove it, or name parameters in optimizer.groups."
        )
    block_of = {id(p): index for index, (_, block) in enumerate(blocks) for p in block.parameters()}
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    num_blocks, next_block = len(blocks), -1
    scales = {}
    for name, parameter in model.named_parameters():
        block = block_of.get(id(parameter))
        if block is not None:
            next_block = block + 1
        depth = -1 if id(parameter) in embeddings else next_block if block is None else block
        if parameter.requires_grad:
            scales[name] = decay ** (num_blocks - depth)
    return scales


def describe_depth_scales(scales: dict[str, float], decay: float) -> str:
    """One line for the log."""
    by_scale = sorted({scale: name for name, scale in reversed(scales.items())}.items())
    (least, first), (most, last) = by_scale[0], by_scale[-1]
    return f"layer decay {decay:g}: rates from x {least:.3g} ({first}) to x {most:.3g} ({last})"
