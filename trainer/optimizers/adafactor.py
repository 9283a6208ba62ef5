"""Adafactor on rows that may be divided over ranks.

Shazeer and Stern, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost" (2018), without momentum, in the form
of ``torch.optim.Adafactor``.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from sharding.part import Part
from trainer.config.optimizer import AdafactorConfig
from trainer.optimizers.beside_adamw import BesideAdamW

_Member = tuple[dict[str, Any], nn.Parameter]


class Adafactor(BesideAdamW):
    """Second moments of matrices as the product of their row and column means.

    Row means are divided over ranks as the rows are; column means are whole on every rank. All means over whole
    parameters travel in two all-reduces a step, for all parameters together: the first has the squares of columns and
    of parameters and the row means, the second the squares of updates, which need the first.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        parameters: Sequence[Part],
        lr: float,
        settings: AdafactorConfig,
    ) -> None:
        """See BesideAdamW."""
        super().__init__(groups, parameters, None, lr)
        self._settings = settings
        self._group = parameters[0].sums_over

    def holds_whole(self, parameter: nn.Parameter, key: str) -> bool:
        """Whether a tensor of the state is whole on every rank; a stack of matrices is divided between matrices."""
        return key == "col_var" and parameter.ndim == 2

    def update(self, members: list[_Member], skips: torch.Tensor, divisor: torch.Tensor | None) -> None:
        """See BesideAdamW; gradients stay undivided, and so do updates: what is computed of them is divided instead."""
        parameters = [parameter for _, parameter in members]
        divisor = parameters[0].new_ones(()) if divisor is None else divisor
        gradients = [gradient for parameter in parameters if (gradient := parameter.grad) is not None]
        states = [self._state(parameter) for parameter in parameters]
        steps = [state["step"] + 1.0 for state in states]
        weights = torch.stack(steps).pow(self._settings.beta2_decay).unbind()
        squares, row_means, column_means = self._whole_means(parameters, gradients, states, weights, skips, divisor)
        for index, (gradient, state) in enumerate(zip(gradients, states, strict=True)):
            means = row_means[index], column_means[index]
            moment = self._second_moment(gradient, state, weights[index], means, skips, divisor)
            # In place: what follows needs the update alone, and the engine drops gradients after the step.
            gradient.mul_(moment.clamp_(min=self._settings.eps**2).rsqrt_())
        update_squares = self._sum_over_ranks(self._mean_squares(parameters, gradients))
        sizes = squares.sqrt().clamp(min=self._settings.min_rms)
        clipping = (update_squares.sqrt() / divisor / self._settings.clip_threshold).clamp(min=1.0)
        limits = torch.stack(
            [step.rsqrt().clamp(max=group["lr"]) for step, (group, _) in zip(steps, members, strict=True)]
        )
        rates = (sizes / clipping * limits / divisor).float().unbind()
        for (group, parameter), gradient, state, rate in zip(members, gradients, states, rates, strict=True):
            decayed = parameter * (1 - group["lr"] * group["weight_decay"])
            torch.where(skips, parameter, decayed.sub_(gradient.mul_(rate)), out=parameter)
            state["step"].add_(~skips)

    def _state(self, parameter: nn.Parameter) -> dict[str, torch.Tensor]:
        state: dict[str, torch.Tensor] = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            if parameter.ndim >= 2:
                *stack, num_rows, num_columns = parameter.shape
                state["row_var"] = parameter.new_zeros(*stack, num_rows, 1)
                state["col_var"] = parameter.new_zeros(*stack, 1, num_columns)
            else:
                state["variance"] = torch.zeros_like(parameter)
        return state

    def _whole_means(
        self,
        parameters: list[nn.Parameter],
        gradients: list[torch.Tensor],
        states: list[dict[str, torch.Tensor]],
        weights: Sequence[torch.Tensor],
        skips: torch.Tensor,
        divisor: torch.Tensor,
    ) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
        """Update the row means, and take the means that need all ranks.

        Returns:
            Mean square of each parameter; and of each matrix the mean of its row means and the mean square of each
            column of its gradient, empty for what is no matrix.
        """
        nothing = parameters[0].new_empty(0, dtype=torch.float64)
        row_means, column_means = [], []
        for parameter, gradient, state, weight in zip(parameters, gradients, states, weights, strict=True):
            row_means.append(nothing)
            column_means.append(nothing)
            if parameter.ndim < 2:
                continue
            norms = torch.linalg.vector_norm(gradient, dim=-1, keepdim=True).div_(divisor)
            rows = norms.square_().div_(gradient.shape[-1])
            state["row_var"].copy_(_blend(state["row_var"], rows, weight, skips))
            if parameter.ndim == 2:
                num_rows = self._parts[parameter].global_shape[0]
                row_means[-1] = state["row_var"].sum(dtype=torch.float64).view(1) / num_rows
                norms = torch.linalg.vector_norm(gradient, dim=0).div_(divisor)
                column_means[-1] = norms.double().square_().div_(num_rows)
        pieces = [self._mean_squares(parameters, parameters), *row_means, *column_means]
        reduced = self._sum_over_ranks(torch.cat(pieces)).split([len(piece) for piece in pieces])
        return reduced[0], list(reduced[1 : 1 + len(parameters)]), list(reduced[1 + len(parameters) :])

    def _second_moment(
        self,
        gradient: torch.Tensor,
        state: dict[str, torch.Tensor],
        weight: torch.Tensor,
        means: tuple[torch.Tensor, torch.Tensor],
        skips: torch.Tensor,
        divisor: torch.Tensor,
    ) -> torch.Tensor:
        """Update the other running means; returns the estimate of each local element's second moment."""
        if gradient.ndim < 2:
            state["variance"].copy_(_blend(state["variance"], (gradient / divisor).square_(), weight, skips))
            return state["variance"].clone()
        row_var, col_var = state["row_var"], state["col_var"]
        if gradient.ndim == 2:
            mean, columns = means[0].float().view(1, 1), means[1].float().view(1, -1)
        else:
            norms = torch.linalg.vector_norm(gradient, dim=-2, keepdim=True).div_(divisor)
            columns = norms.square_().div_(gradient.shape[-2])
            mean = row_var.mean(dim=-2, keepdim=True)
        col_var.copy_(_blend(col_var, columns, weight, skips))
        return (row_var @ col_var).div_(mean.clamp(min=self._settings.eps))

    def _mean_squares(self, parameters: list[nn.Parameter], tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """Of each tensor this rank's addend of the mean square over the whole, in fp64."""
        norms = torch._foreach_norm(list(tensors), 2, dtype=torch.float64)
        scales = [math.sqrt(math.prod(self._parts[parameter].global_shape)) for parameter in parameters]
        return torch.stack(torch._foreach_div(norms, scales)).square()

    def _sum_over_ranks(self, values: torch.Tensor) -> torch.Tensor:
        if self._group is not None:
            dist.all_reduce(values, group=self._group)
        return values


def _blend(old: torch.Tensor, new: torch.Tensor, weight: torch.Tensor, skips: torch.Tensor) -> torch.Tensor:
    return torch.where(skips, old, old.lerp(new, weight))
