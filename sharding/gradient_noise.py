"""Norms of each micro-batch's own gradient, read in backward before it is accumulated or reduced over ranks."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from sharding.gradient_leaves import gradient_leaves


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
            # Once each, also those that are tied.
            self._leaves = list(dict.fromkeys(gradient_leaves(self._model).values()))
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

    def _add(self, gradient: torch.Tensor | None) -> None:
        if gradient is None:
            return
        # fp64, since the noise is a difference of norms that may be close to one another.
        self._norms[-1].append(torch.linalg.vector_norm(gradient, dtype=torch.float64))
