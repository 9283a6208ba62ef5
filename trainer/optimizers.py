"""Optimizers and their parameter groups."""

from collections.abc import Iterable

import torch
from torch import nn

from sharding.engine import OptimizerFactory
from trainer.sections import OptimizerConfig


def optimizer_factory(config: OptimizerConfig) -> OptimizerFactory:
    """What builds the configured optimizer once parameters lie where they stay.

    Both optimizers use torch's fused kernels, which skip a step on the device when told that a gradient was not
    finite.
    """

    def build(named_parameters: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        groups = _decay_groups(named_parameters, config.weight_decay)
        if config.name == "sgd":
            return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov, fused=True)
        return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)

    return build


def _decay_groups(named_parameters: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict[str, object]]:
    """Matrices are decayed; vectors (norm gains, biases) are not."""
    parameters = [parameter for _, parameter in named_parameters]
    groups: list[dict[str, object]] = [
        {"params": [p for p in parameters if len(getattr(p, "ds_shape", p.shape)) >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if len(getattr(p, "ds_shape", p.shape)) < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
