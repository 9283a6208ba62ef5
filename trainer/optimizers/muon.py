"""Muon: momentum made orthogonal by Newton-Schulz iteration, for matrices that may be divided over ranks.

Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024); conventions of ``torch.optim.Muon``.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from sharding.part import Part
from trainer.config.optimizer import MuonConfig
from trainer.optimizers.beside_adamw import BesideAdamW
from trainer.optimizers.row_exchange import RowExchange

_NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_NS_EPS = 1e-7


class Muon(BesideAdamW):
    """Muon for whole or divided matrices, AdamW for everything else.

    A divided matrix is put together on one rank of the shard group, its owner, which makes it orthogonal and sends the
    rows back. So each matrix is computed once, and two all-to-all exchanges carry all matrices of a step.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        parameters: Sequence[Part],
        rest: torch.optim.AdamW | None,
        lr: float,
        settings: MuonConfig,
    ) -> None:
        """See BesideAdamW; all parameters are matrices."""
        super().__init__(groups, parameters, rest, lr)
        self._settings = settings
        self._exchanges: dict[tuple[nn.Parameter, ...], RowExchange] = {}

    def update(
        self, members: list[tuple[dict[str, Any], nn.Parameter]], skips: torch.Tensor, divisor: torch.Tensor | None
    ) -> None:
        """See BesideAdamW."""
        directions = [self._direction(parameter, skips, divisor) for _, parameter in members]
        orthogonal = self._orthogonalize([parameter for _, parameter in members], directions)
        for (group, parameter), step in zip(members, orthogonal, strict=True):
            rate = group["lr"] * self._adjustment(self._parts[parameter].global_shape)
            decayed = parameter * (1 - group["lr"] * group["weight_decay"])
            torch.where(skips, parameter, decayed.add_(step, alpha=-rate), out=parameter)

    def _direction(self, parameter: nn.Parameter, skips: torch.Tensor, divisor: torch.Tensor | None) -> torch.Tensor:
        """What is to be made orthogonal: momentum, or its Nesterov form."""
        gradient, weight, state = parameter.grad, self._settings.momentum, self.state[parameter]
        assert gradient is not None
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        if divisor is not None:
            gradient.div_(divisor)
        mean = state["momentum_buffer"]
        torch.where(skips, mean, mean.lerp(gradient, 1 - weight), out=mean)
        return gradient.lerp(mean, weight) if self._settings.nesterov else mean

    def _orthogonalize(self, parameters: list[nn.Parameter], directions: list[torch.Tensor]) -> list[torch.Tensor]:
        # As torch and Jordan do on GPUs; a CPU multiplies fp32 faster than bf16.
        dtype = torch.bfloat16 if directions[0].is_cuda else torch.float32
        directions = [direction.to(dtype) for direction in directions]
        exchange = self._exchange(parameters)
        if exchange is None:
            return [orthogonalize(direction, self._settings.num_ns_steps) for direction in directions]
        owned = exchange.to_owners(directions)
        orthogonal = [orthogonalize(matrix, self._settings.num_ns_steps) for matrix in owned]
        return exchange.to_rows(orthogonal, like=directions[0])

    def _exchange(self, parameters: list[nn.Parameter]) -> RowExchange | None:
        parts = [self._parts[parameter] for parameter in parameters]
        group = parts[0].sums_over
        if group is None:
            return None
        key = tuple(parameters)
        if key not in self._exchanges:
            self._exchanges[key] = RowExchange(parts, group)
        return self._exchanges[key]

    def _adjustment(self, shape: tuple[int, ...]) -> float:
        if self._settings.lr_adjustment == "original":
            return math.sqrt(max(1.0, shape[0] / shape[1]))
        # Liu et al., "Muon is Scalable for LLM Training" (2025), equation 4.
        return 0.2 * math.sqrt(max(shape))


def orthogonalize(matrix: torch.Tensor, num_steps: int) -> torch.Tensor:
    """A matrix with the singular vectors of ``matrix`` and singular values near 1, by quintic Newton-Schulz steps.

    Computed in the format of ``matrix``, which is left as it is. The coefficients are Jordan's: they trade exactness
    for few steps and leave singular values between about 0.7 and 1.2.
    """
    a, b, c = _NS_COEFFICIENTS
    is_tall = matrix.shape[0] > matrix.shape[1]
    result = matrix.T if is_tall else matrix
    result = result / result.norm().clamp(min=_NS_EPS)
    for _ in range(num_steps):
        gram = result @ result.T
        polynomial = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        result = torch.addmm(result, polynomial, result, beta=a)
    return result.T if is_tall else result
