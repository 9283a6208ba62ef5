"""From settings to an optimizer: which parameters share which settings, and who updates them."""

from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch

from sharding.engine import OptimizerFactory
from sharding.part import Part
from sharding.ranks.errors import UserError
from trainer.config.name_patterns import matching_names, without_match
from trainer.config.optimizer import OptimizerConfig, OptimizerGroupConfig
from trainer.optimizers.adafactor import Adafactor
from trainer.optimizers.momentum_sgd import MomentumSGD
from trainer.optimizers.muon import Muon


def optimizer_factory(
    config: OptimizerConfig, hidden_matrices: Collection[str], scales: Mapping[str, float] = MappingProxyType({})
) -> OptimizerFactory:
    """What builds the configured optimizer once parameters lie where they stay.

    All of them skip a step on the device when told that a gradient was not finite; torch's do so in their fused
    kernels. The factory raises UserError where a pattern of ``optimizer.groups`` is left without parameters, or where
    the model has nothing that the optimizer is for.

    Args:
        config: the optimizer.
        hidden_matrices: names of the matrices inside blocks, no embeddings: what Muon is for.
        scales: factor to the learning rate of parameters, by their names; 1 where there is none.
    """

    def build(parameters: Sequence[Part]) -> torch.optim.Optimizer:
        groups = _Groups(config, parameters, scales)
        if config.name == "sgd":
            return MomentumSGD(
                groups.of(parameters), lr=config.lr, momentum=config.momentum, nesterov=config.nesterov, fused=True
            )
        if config.name == "adamw":
            return _adamw(config, groups.of(parameters))
        if config.name == "adafactor":
            return Adafactor(groups.of(parameters), parameters, config.lr, config.adafactor)
        if config.name == "muon":
            return _muon(config, parameters, groups, hidden_matrices)
        return _adamw_8bit(config, parameters, groups)

    return build


def _adamw(config: OptimizerConfig, groups: list[dict[str, Any]]) -> torch.optim.AdamW:
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def _muon(
    config: OptimizerConfig, parameters: Sequence[Part], groups: "_Groups", hidden_matrices: Collection[str]
) -> Muon:
    own = [parameter for parameter in parameters if parameter.name in hidden_matrices]
    rest = [parameter for parameter in parameters if parameter.name not in hidden_matrices]
    if not own:
        raise UserError(
            "optimizer.name=muon is for matrices inside repeated blocks, but this model has none; "
            "set optimizer.name to adamw."
        )
    adamw = _adamw(config, groups.of(rest)) if rest else None
    return Muon(groups.of(own), own, adamw, config.lr, config.muon)


def _adamw_8bit(config: OptimizerConfig, parameters: Sequence[Part], groups: "_Groups") -> torch.optim.Optimizer:
    # Loads torchao, which only this optimizer needs.
    from trainer.optimizers.adamw_8bit import AdamW8bit, quantization_block

    own = [parameter for parameter in parameters if quantization_block(parameter.global_shape) is not None]
    rest = [parameter for parameter in parameters if quantization_block(parameter.global_shape) is None]
    if not own:
        raise UserError(
            "optimizer.name=adamw8bit keeps moments in 8 bits where a parameter has at least 4096 values and its rows "
            "divide into blocks of 64 to 256, which is so for no parameter of this model; set optimizer.name to adamw."
        )
    adamw = _adamw(config, groups.of(rest)) if rest else None
    return AdamW8bit(groups.of(own), own, adamw, config.lr, config.betas, config.eps)


class _Groups:
    """Which learning-rate factor and decay each parameter has."""

    def __init__(self, config: OptimizerConfig, parameters: Sequence[Part], scales: Mapping[str, float]) -> None:
        """Match patterns with names.

        Raises:
            UserError: a pattern is left without parameters.
        """
        # Matrices are decayed; vectors (norm gains, biases) are not.
        decays = [config.weight_decay if len(parameter.global_shape) >= 2 else 0.0 for parameter in parameters]
        self._settings = {p.name: (1.0, decay) for p, decay in zip(parameters, decays, strict=True)}
        free = [parameter.name for parameter in parameters]
        for index, group in enumerate(config.groups):
            matched = self._apply(index, group, free)
            free = [name for name in free if name not in matched]
        self._settings = {
            name: (lr_scale * scales.get(name, 1.0), decay) for name, (lr_scale, decay) in self._settings.items()
        }

    def _apply(self, index: int, group: OptimizerGroupConfig, free: list[str]) -> set[str]:
        """Give a group's settings to those of the free parameters that match; returns their names."""
        matched = set(matching_names(group.pattern, free))
        if not matched:
            raise UserError(_without_parameters(index, group.pattern, list(self._settings), free))
        for name in matched:
            decay = self._settings[name][1] if group.weight_decay is None else group.weight_decay
            self._settings[name] = (group.lr_scale, decay)
        return matched

    def of(self, parameters: Sequence[Part]) -> list[dict[str, Any]]:
        """Parameter groups for torch of some parameters: those with equal settings together."""
        members: dict[tuple[float, float], list[torch.Tensor]] = {}
        for parameter in parameters:
            members.setdefault(self._settings[parameter.name], []).append(parameter.tensor)
        return [
            {"params": tensors, "lr_scale": lr_scale, "weight_decay": decay}
            for (lr_scale, decay), tensors in members.items()
        ]


def _without_parameters(index: int, pattern: str, names: list[str], free: list[str]) -> str:
    setting = f"optimizer.groups.{index}.pattern"
    if taken := matching_names(pattern, names):
        return (
            f"{setting}={pattern} matches only parameters that an earlier group has, such as {taken[0]}; put the "
            "narrower pattern first."
        )
    return without_match(setting, pattern, free, "trained parameter")
