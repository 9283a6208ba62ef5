"""Norms of each micro-batch's own gradient, read in backward before it is accumulated or reduced over ranks."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


class MicroBatchNorms:
    """Hooks on a model's leaves that are there only while they are needed."""

    def __init__(self, model: nn.Module) -> None:
        """Bind to a model in its final form; nothing is touched yet."""
        self._model = model
        self._leaves: list[nn.Parameter] | None = None
        self._norms: list[list[torch.Tensor]] = []

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record what happens inside: one forward and backward pass per micro-batch.

        The first time, every rank must call it, since sharded parameters are gathered once to find their leaves.
        """
        if self._leaves is None:
            self._leaves = _find_leaves(self._model)
        self._norms = []
        handles = [self._model.register_forward_pre_hook(self._begin_micro_batch)]
        # A leaf's hook sees the gradient once per backward pass, summed over all uses, so shared weights count once.
        handles += [leaf.register_hook(self._add) for leaf in self._leaves]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def squares(self) -> torch.Tensor:
        """Squared L2 norm of each recorded micro-batch's gradient as backward made it, fp64 [micro-batches]."""
        return torch.stack([torch.stack(norms).square().sum() for norms in self._norms])

    def _begin_micro_batch(self, module: nn.Module, arguments: object) -> None:
        self._norms.append([])

    def _add(self, gradient: torch.Tensor) -> None:
        # fp64, since the noise is a difference of norms that may be close to one another.
        self._norms[-1].append(torch.linalg.vector_norm(gradient, dtype=torch.float64))


def _find_leaves(model: nn.Module) -> list[nn.Parameter]:
    """The tensors that autograd accumulates gradients for, each once.

    Under ``fully_shard`` these are the gathered parameters; each comes into being with the first gathering of its
    module and stays the same object from then on.
    """
    leaves = {id(p): p for p in model.parameters() if not isinstance(p, DTensor)}
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.unshard()
            leaves |= {id(p): p for p in module.parameters() if not isinstance(p, DTensor)}
            module.reshard()
    return [leaf for leaf in leaves.values() if leaf.requires_grad]
