"""Parameters in 16 bits, with which a model computes in place of its fp32 ones."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn


class ComputeCopies:
    """A 16-bit copy of each fp32 parameter, which takes its place in the model's modules for a while.

    Copies are made anew each time, in the same memory, and stay for all micro-batches of a step. Each is the result of
    a conversion that autograd knows: the gradients of its uses within one backward pass add up in 16 bits, as they do
    in any model of that format, and come to the parameter itself in fp32, where micro-batches add up. What hangs on the
    parameter, as hooks and the buckets of DDP do, does not notice.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, *, is_constant: bool = False) -> None:
        """Bind to a model whose parameters stay the objects that they are; memory comes with the first use.

        Args:
            model: the model.
            dtype: format of the copies; parameters that have it, or that are no floating-point numbers, are left alone.
            is_constant: whether parameters never change once copies are there, which are then made once.
        """
        self._dtype = dtype
        self._is_constant = is_constant
        self._named = tuple(model.named_parameters())
        masters = {id(p): p for p in model.parameters() if p.is_floating_point() and p.dtype is not dtype}
        self._masters = list(masters.values())
        self._memory: list[torch.Tensor] = []
        index_of = {key: index for index, key in enumerate(masters)}
        # Wherever it is, since parameters may be shared.
        self._places = [
            (module, name, index_of[id(parameter)])
            for module in model.modules()
            for name, parameter in module._parameters.items()
            if id(parameter) in index_of
        ]
        self._recurrent = [module for module in model.modules() if isinstance(module, nn.RNNBase)]

    def named_masters(self) -> list[tuple[str, nn.Parameter]]:
        """The model's parameters with their names, whatever the modules hold."""
        return list(self._named)

    @contextmanager
    def in_place(self, *, has_gradients: bool) -> Iterator[None]:
        """Have the modules hold the copies: in forward passes, and in backward passes, which may recompute them.

        Args:
            has_gradients: whether backward passes follow.
        """
        with torch.set_grad_enabled(has_gradients):
            copies = self._converted()
        self._put(copies)
        try:
            yield
        finally:
            self._put(self._masters)

    def _converted(self) -> list[torch.Tensor]:
        if self._memory and self._is_constant:
            return self._memory
        if not self._memory:
            self._memory = [
                torch.empty_like(master, dtype=self._dtype, requires_grad=False) for master in self._masters
            ]
        # Each time another tensor of the same memory, which becomes the result of a conversion.
        pairs = zip(self._memory, self._masters, strict=True)
        return [memory.detach().copy_(master) for memory, master in pairs]

    def _put(self, tensors: Sequence[torch.Tensor]) -> None:
        for module, name, index in self._places:
            # Not by the attribute, which takes nn.Parameter alone.
            module._parameters[name] = tensors[index]  # type: ignore[assignment]
        for module in self._recurrent:
            # Which they compute with.
            module._flat_weights = [getattr(module, name, None) for name in module._flat_weights_names]
