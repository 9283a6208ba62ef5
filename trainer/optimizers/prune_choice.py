"""Which parameters are pruned, and how many of their weights."""

import math
from collections.abc import Mapping, Sequence

from sharding.ranks.errors import AgreedError, UserError
from trainer.config.name_patterns import matching_names, without_match
from trainer.config.optimizer import OptimizerName
from trainer.config.prune import BY_GRADIENTS, PruneConfig


def pruned_parameters(
    config: PruneConfig, layer_weights: Sequence[str], trained: Mapping[str, tuple[int, ...]]
) -> list[str]:
    """Names of the parameters that are pruned, in the model's order.

    Args:
        config: pruning, with a sparsity.
        layer_weights: those that are pruned where nothing else is said, see ``sharding.blocks.layer_weights``.
        trained: shape of each parameter that is trained, by its name, in the model's order.

    Raises:
        UserError: a pattern matches none that can be pruned, none is left, or one would have no weight left.
    """
    matrices = [name for name, shape in trained.items() if len(shape) >= 2]
    chosen = list(layer_weights)
    if config.parameters:
        matched = {name for pattern in config.parameters for name in _matching("parameters", pattern, matrices)}
        chosen = [name for name in matrices if name in matched]
    excluded = {name for pattern in config.exclude for name in _matching("exclude", pattern, matrices)}
    chosen = [name for name in chosen if name not in excluded]
    if config.pattern == "2:4":
        uneven = [name for name in chosen if math.prod(trained[name][1:]) % 4]
        if uneven and config.parameters:
            raise UserError(
                f"prune.pattern=2:4 takes four weights of a row together, but a row of {uneven[0]} "
                f"{list(trained[uneven[0]])} has {math.prod(trained[uneven[0]][1:])}, which four does not divide; add "
                "it to prune.exclude."
            )
        chosen = [name for name in chosen if name not in uneven]
    if not chosen:
        raise UserError(
            f"prune.sparsity={config.sparsity:g} prunes trained matrices and kernels, but prune.parameters, "
            "prune.exclude, prune.pattern and the model leave none; change one of them."
        )
    if config.scope == "layer":
        for name in chosen:
            size = math.prod(trained[name])
            if num_pruned(size, config.sparsity) == size:
                raise nothing_left(config, name, size)
    return chosen


def keeps_squares(config: PruneConfig, optimizer: OptimizerName) -> bool:
    """Whether a mean of squared gradients is kept for pruning: AdamW's serves where it has one of every parameter."""
    return bool(config.sparsity) and config.by in BY_GRADIENTS and optimizer != "adamw"


def num_pruned(num_weights: int, sparsity: float) -> int:
    """How many of so many weights a sparsity is: the nearest whole number."""
    return round(sparsity * num_weights)


def nothing_left(config: PruneConfig, name: str, num_weights: int) -> AgreedError:
    """What to say where a parameter would be all zero."""
    return AgreedError(
        f"prune.sparsity={config.sparsity:g} by {config.by}, prune.scope={config.scope}, leaves nothing of {name} "
        f"({num_weights:,} weights), and the model would not see its input through it; lower prune.sparsity, "
        f"{'set prune.scope=layer, ' if config.scope == 'global' else ''}or add {name} to prune.exclude."
    )


def _matching(setting: str, pattern: str, names: Sequence[str]) -> list[str]:
    found = matching_names(pattern, names)
    if not found:
        raise UserError(without_match(f"prune.{setting}", pattern, names, "trained matrix or kernel"))
    return found
