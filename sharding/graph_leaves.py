"""What a backward pass will come to."""

from collections.abc import Iterator

import torch


def leaves_of(loss: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensors for which a backward pass from ``loss`` accumulates gradients; a walk through its graph."""
    seen, pending = set(), [loss.grad_fn]
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        pending += [following for following, _ in node.next_functions]
