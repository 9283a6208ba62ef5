"""Parameters in 16 bits where ZeRO-3 gathers them in fp32, which it does when a module is called."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class GatheredCopies:
    """Has the modules of a model that DeepSpeed has divided give out their parameters in another format.

    By the dictionaries of parameters, which DeepSpeed has replaced by its own already: whoever asks for a parameter,
    its module or another, gets it whole and converted. What several modules share is converted once, so that the
    gradients of its uses add up in the format that they have.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        """Take over the dictionaries of a model after ``deepspeed.initialize``.

        Args:
            model: the model.
            dtype: format in which parameters are given out.
        """
        from deepspeed.runtime.zero.parameter_offload import ZeROOrderedDict

        copies = self

        class Converting(ZeROOrderedDict):
            # Of parameters that other modules have as well: a name here to a number that all of them know it by.
            shared: dict[str, int]

            def __getitem__(self, key: str) -> Any:
                parameter = super().__getitem__(key)
                if not copies._is_computing or parameter is None or not parameter.is_floating_point():
                    return parameter
                if key not in self.shared:
                    return parameter.to(dtype)
                if self.shared[key] not in copies._of_shared:
                    copies._of_shared[self.shared[key]] = parameter.to(dtype)
                return copies._of_shared[self.shared[key]]

        self._is_computing = False
        self._of_shared: dict[int, torch.Tensor] = {}
        num_uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
        for module in model.modules():
            own = {name: id(parameter) for name, parameter in module._parameters.items()}
            module._parameters.__class__ = Converting
            # Numbers are compared while a graph is made, in which a parameter's identity must not be asked for.
            module._parameters.shared = {name: key for name, key in own.items() if num_uses[key] > 1}  # type: ignore[attr-defined]
            if isinstance(module, nn.RNNBase):
                module.register_forward_pre_hook(lambda layer, _: _list_weights(layer))
                module.register_forward_hook(lambda layer, *_: _list_weights(layer), prepend=True)

    @contextmanager
    def in_place(self, *, has_gradients: bool) -> Iterator[None]:
        """Give out parameters in the format: in forward passes, and in backward passes, which may recompute them.

        Args:
            has_gradients: whether backward passes follow; it makes no difference here.
        """
        self._is_computing = True
        try:
            yield
        finally:
            self._is_computing = False
            self._of_shared.clear()


def _list_weights(layer: nn.RNNBase) -> None:
    """Have a recurrent layer compute with what its attributes give out now."""
    layer._flat_weights = [getattr(layer, name, None) for name in layer._flat_weights_names]
