"""Linear layers that compute with weights as quantisation will round them.

torchao's own (``QATConfig``) are not taken: its grid has the largest weight of a group halfway between two steps, where
the last bit decides and ranks need not agree, and no kernel for processors has that grid. This one is that of ONNX
Runtime's ``MatMulNBits``, bit for bit.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from sharding.ranks.errors import UserError
from trainer.config.quantization import BLOCK_SIZE
from trainer.config.sections import ModelConfig

_LOWEST, _HIGHEST = -8, 7


class RoundedLinear(nn.Linear):
    """A linear layer whose weights are rounded to 4 bits in each pass."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Product with the rounded weights."""
        return functional.linear(input, _Rounding.apply(self.weight), self.bias)


def rounded(weight: torch.Tensor) -> torch.Tensor:
    """Weights as ``int4-weight`` stores them: multiples, from -8 to 7, of a scale that 32 weights of a row share.

    Args:
        weight: [outputs, inputs]; a last block of a row may be shorter.
    """
    num_rows, num_inputs = weight.shape
    blocks = functional.pad(weight.float(), (0, -num_inputs % BLOCK_SIZE)).view(num_rows, -1, BLOCK_SIZE)
    # The largest is at the end of the range that has one step more, whatever its sign.
    scales = blocks.gather(-1, blocks.abs().argmax(dim=-1, keepdim=True)) / _LOWEST
    steps = torch.where(scales == 0, 0.0, blocks / scales).round().clamp(_LOWEST, _HIGHEST)
    return (steps * scales).view(num_rows, -1)[:, :num_inputs].to(weight.dtype)


class _Rounding(torch.autograd.Function):
    """Rounds weights, and hands their gradient on as it is (Bengio et al., 2013, the straight-through estimator)."""

    @staticmethod
    def forward(_: Any, weight: torch.Tensor) -> torch.Tensor:
        return rounded(weight)

    @staticmethod
    def backward(_: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


def make_aware(model: nn.Module, settings: ModelConfig) -> str:
    """Have a model's linear layers round their weights in each pass, in place.

    Parameters keep their names and stay what they were, shared and frozen ones as well.

    Args:
        model: before it is sharded; on the meta device or not.
        settings: the section ``model``; nothing is done without ``quantize_aware``.

    Returns:
        One line for the log; empty where nothing is done.

    Raises:
        UserError: there is no such layer, or others multiply by matrices that would be quantized as well.
    """
    if settings.quantize_aware is None:
        return ""
    # What a subclass computes may be no product; and some, as inside torch's attention, are never called.
    layers = [module for module in model.modules() if type(module) is nn.Linear]
    others = sorted(
        {type(module).__name__ for module in model.modules()} & {"Conv1D", "NonDynamicallyQuantizableLinear"}
    )
    if not layers or others:
        reason = f"multiplies by those of {others[0]} as well" if others else "has none"
        raise UserError(
            f"model.quantize_aware={settings.quantize_aware} rounds the weights of linear layers, and this "
            f"{type(model).__name__} {reason}; remove it, or choose another model."
        )
    for layer in layers:
        layer.__class__ = RoundedLinear
    return f"weights of {len(layers)} linear layers are rounded in each pass, as {settings.quantize_aware} will"
