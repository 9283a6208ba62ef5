"""Recurrent layers, whose weights stay where a strategy or the optimizer has them."""

import torch
from torch import nn


def leave_recurrent_weights_alone(module: nn.Module) -> None:
    """Keep recurrent layers from copying their weights into one piece of memory, as cuDNN likes them.

    The copy is made at the first forward pass on a GPU, and the layer computes with it from then on. What is gathered
    or updated afterwards in the memory that the strategy manages would no longer reach it; where the strategy manages
    none, whoever looked at the weights before, to average them, would look at memory that nobody uses. It costs cuDNN
    a copy at each pass.
    """
    for recurrent in module.modules():
        if isinstance(recurrent, torch.nn.RNNBase):
            recurrent.flatten_parameters = lambda: None  # type: ignore[method-assign]
