"""Recurrent layers under strategies that manage the memory of parameters."""

import torch
from torch import nn


def leave_recurrent_weights_alone(module: nn.Module) -> None:
    """Keep recurrent layers from copying their weights into one piece of memory, as cuDNN likes them.

    The copy is made at the first forward pass on a GPU, and the layer computes with it from then on. What is gathered
    or updated afterwards in the memory that the strategy manages would no longer reach it.
    """
    for recurrent in module.modules():
        if isinstance(recurrent, torch.nn.RNNBase):
            recurrent.flatten_parameters = lambda: None  # type: ignore[method-assign]
