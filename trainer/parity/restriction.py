"""The plain side's adapters, frozen and rounded parameters: found and made here, not as ``trainer.model`` does."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from trainer.config.sections import ALL_LINEAR, ModelConfig


def restrict(model: Any, settings: ModelConfig) -> None:
    """Put adapters into a plain model, let only what the run trains have gradients, and round what it rounds.

    Args:
        model: a model of `transformers` where there are adapters.
        settings: the section ``model``.
    """
    if settings.lora.rank:
        _add_adapters(model, settings)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if any(fnmatchcase(name, pattern) for pattern in settings.freeze):
            parameter.requires_grad_(False)
    if settings.quantize_aware is not None:
        for module in model.modules():
            if type(module) is nn.Linear:
                module.forward = partial(_rounded_product, module)  # type: ignore[method-assign]


def some_to_freeze(model: nn.Module) -> list[str]:
    """Names of a first part of a model's parameters and of single ones behind it; none of batch normalisation's.

    Where all of its parameters are frozen, that computes something else.
    """
    names = [
        f"{name}.{own}" if name else own
        for name, module in model.named_modules()
        if not isinstance(module, nn.modules.batchnorm._BatchNorm)
        for own, _ in module.named_parameters(recurse=False)
    ]
    # Shared ones have one name.
    names = [name for name, _ in model.named_parameters() if name in names]
    third = len(names) // 3
    return names[:third] + names[third + 1 :: 5]


def _rounded_product(layer: nn.Linear, inputs: torch.Tensor) -> torch.Tensor:
    """Product with weights of 4 bits and a scale for each 32 of a row, the gradient of which is the weights'."""
    pieces = []
    for block in layer.weight.detach().split(32, dim=1):
        largest = torch.where(block.amax(1) > -block.amin(1), block.amax(1), block.amin(1))[:, None]
        scale = torch.where(largest == 0, 1.0, largest / -8)
        pieces.append((block / scale).round().clamp(-8, 7) * scale)
    change = torch.cat(pieces, dim=1) - layer.weight.detach()
    return functional.linear(inputs, layer.weight + change, layer.bias)


def _add_adapters(model: Any, settings: ModelConfig) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    backbone = {name: module for name, module in model.base_model.named_modules() if "pooler" not in name.split(".")}
    inside = {id(module) for module in backbone.values()}
    lora = LoraConfig(
        r=settings.lora.rank,
        lora_alpha=settings.lora.alpha_or_default,
        target_modules=_targets(model, inside, settings.lora.targets),
    )
    # It freezes what is no adapter.
    inject_adapter_in_model(lora, model)
    if settings.new_head:
        kept = {id(parameter) for module in backbone.values() for parameter in module.parameters(recurse=False)}
        for parameter in model.parameters():
            if id(parameter) not in kept:
                parameter.requires_grad_(True)


def _targets(model: nn.Module, inside: set[int], targets: Sequence[str]) -> list[str]:
    from transformers.pytorch_utils import Conv1D

    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    found: list[str] = []
    for target in targets:
        if target == ALL_LINEAR:
            found += [name for name, module in linear.items() if id(module) in inside]
        else:
            found += [name for name in linear if fnmatchcase(name, target) or name.split(".")[-1] == target]
    return found
