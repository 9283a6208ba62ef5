"""AdamW with moments in 8 bits, by torchao's quantisation.

Dettmers et al., "8-bit Optimizers via Block-wise Quantization" (2022). Blocks lie inside rows, so that neither training
nor the saved state depends on how rows are divided over ranks; torchao's own optimizer cuts each rank's memory into
blocks.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import nn
from torchao.optim.quant_utils import create_dynamic_map, dequant_with_qmap, quantize_8bit_with_qmap, scale_tensor

from sharding.part import Part
from trainer.optimizers.beside_adamw import BesideAdamW
from trainer.runtime.compiled_by_shape import compiled_by_shape

_LARGEST_BLOCK = 256
_SMALLEST_BLOCK = 64
_SMALLEST_PARAMETER = 4096
"""As torchao and bitsandbytes: smaller ones stay in fp32."""


class AdamW8bit(BesideAdamW):
    """AdamW whose two moments take a byte a value and 4 bytes a block, for parameters whose rows divide into blocks."""

    def __init__(
        self,
        groups: list[dict[str, Any]],
        parameters: Sequence[Part],
        rest: torch.optim.AdamW | None,
        lr: float,
        betas: tuple[float, float],
        eps: float,
    ) -> None:
        """See BesideAdamW; every parameter has a ``quantization_block``."""
        super().__init__(groups, parameters, rest, lr)
        self._betas, self._eps = betas, eps
        is_cuda = parameters[0].tensor.is_cuda
        # A GPU would launch some 40 kernels a parameter; a CPU gains little for the minutes that compilation takes.
        self._update_one = compiled_update() if is_cuda else _update

    def update(
        self, members: list[tuple[dict[str, Any], nn.Parameter]], skips: torch.Tensor, divisor: torch.Tensor | None
    ) -> None:
        """See BesideAdamW."""
        for group, parameter in members:
            state = self._state(parameter)
            if parameter.numel() == 0 or parameter.grad is None:
                continue
            # As tensors on the host: numbers would be compiled anew whenever the rate changes.
            rate, decay = torch.tensor([group["lr"], group["lr"] * group["weight_decay"]]).unbind()
            self._update_one(
                parameter.detach(),
                parameter.grad,
                divisor,
                state,
                (_quantization_map(True, parameter.device), _quantization_map(False, parameter.device)),
                skips,
                rate,
                decay,
                self._betas,
                self._eps,
            )

    def _state(self, parameter: nn.Parameter) -> dict[str, torch.Tensor]:
        state: dict[str, torch.Tensor] = self.state[parameter]
        if not state:
            shape = self._parts[parameter].global_shape
            block = quantization_block(shape)
            assert block is not None
            num_blocks = math.prod(shape[1:]) // block
            state["step"] = torch.zeros((), device=parameter.device)
            for moment in ("exp_avg", "exp_avg_sq"):
                state[f"{moment}_codes"] = torch.zeros_like(parameter, dtype=torch.uint8)
                state[f"{moment}_scales"] = parameter.new_zeros(len(parameter), num_blocks)
        return state


def quantization_block(shape: tuple[int, ...]) -> int | None:
    """Values that share a scale: the largest divisor of a row's length from 64 to 256.

    None where there is none or the parameter has fewer than 4096 values: its moments stay in fp32.
    """
    row_length = math.prod(shape[1:])
    if len(shape) < 2 or shape[0] * row_length < _SMALLEST_PARAMETER:
        return None
    return next((size for size in range(_LARGEST_BLOCK, _SMALLEST_BLOCK - 1, -1) if row_length % size == 0), None)


def compiled_update(backend: str = "inductor") -> Callable[..., None]:
    """The update of one parameter, compiled for each shape by a backend of ``torch.compile``."""
    return compiled_by_shape(_update, backend)


def _update(
    parameter: torch.Tensor,
    gradient: torch.Tensor,
    divisor: torch.Tensor | None,
    state: dict[str, torch.Tensor],
    maps: tuple[torch.Tensor, torch.Tensor],
    skips: torch.Tensor,
    rate: torch.Tensor,
    decay: torch.Tensor,
    betas: tuple[float, float],
    eps: float,
) -> None:
    if divisor is not None:
        gradient = gradient / divisor
    step = state["step"] + 1
    mean = _read(state, "exp_avg", maps[0]).lerp(gradient, 1 - betas[0])
    square = _read(state, "exp_avg_sq", maps[1]).lerp(gradient.square(), 1 - betas[1])
    denominator = square.sqrt() / (1 - betas[1] ** step).sqrt() + eps
    moved = parameter - decay * parameter - rate * (mean / (1 - betas[0] ** step)) / denominator
    _write(state, "exp_avg", maps[0], mean, skips)
    _write(state, "exp_avg_sq", maps[1], square, skips)
    parameter.copy_(torch.where(skips, parameter, moved))
    state["step"].add_(~skips)


def _read(state: dict[str, torch.Tensor], moment: str, code_map: torch.Tensor) -> torch.Tensor:
    return dequant_with_qmap(state[f"{moment}_codes"], code_map, state[f"{moment}_scales"].view(-1))


def _write(
    state: dict[str, torch.Tensor], moment: str, code_map: torch.Tensor, values: torch.Tensor, skips: torch.Tensor
) -> None:
    codes, scales = state[f"{moment}_codes"], state[f"{moment}_scales"]
    scaled, new_scales = scale_tensor(values, codes.numel() // scales.numel())
    codes.copy_(torch.where(skips, codes, quantize_8bit_with_qmap(scaled, code_map)))
    scales.copy_(torch.where(skips, scales, new_scales.view_as(scales)))


@cache
def _quantization_map(signed: bool, device: torch.device) -> torch.Tensor:
    """The 256 values that codes stand for, before scaling."""
    return torch.tensor(create_dynamic_map(signed=signed), device=device)
