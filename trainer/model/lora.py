"""Low-rank adapters (LoRA) beside the frozen weights of a model, by peft, and what their tensors are called.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (2021).
"""

import math
import re
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from sharding.batch_norm import hold_statistics
from sharding.initialization import InitializeModule
from sharding.ranks.errors import UserError
from trainer.config.sections import ALL_LINEAR, LoraConfig, ModelConfig
from trainer.model.new_head import body_of

_BASE = ".base_layer."
_FIRST, _SECOND = ".lora_A.default", ".lora_B.default"


def add_adapters(model: nn.Module, settings: ModelConfig) -> str:
    """Put adapters beside linear layers, in place, and freeze all else but a new head.

    The model keeps its class; a layer ``X`` becomes ``X.base_layer`` beside ``X.lora_A.default`` and
    ``X.lora_B.default``.

    Args:
        model: a model of `transformers` on the meta device, before it is sharded.
        settings: the section ``model``; nothing is done where it has no adapters.

    Returns:
        One line for the log; empty without adapters.

    Raises:
        UserError: a target matches nothing, or what cannot have an adapter.
    """
    if not settings.lora.rank:
        return ""
    body = body_of(model)
    names = _target_layers(model, settings, body)
    _inject(model, settings.lora, names)
    for name, parameter in model.named_parameters():
        is_of_new_head = settings.new_head and plain_name(name) not in body
        parameter.requires_grad_(is_adapter(name) or is_of_new_head)
    hold_statistics(model)
    kinds = Counter(name.rpartition(".")[2] for name in names)
    shown = ", ".join(f"{kind} x {count}" for kind, count in kinds.items())
    trained = "adapters and the head" if settings.new_head else "adapters"
    return (
        f"LoRA of rank {settings.lora.rank}, scaled by {settings.lora.scale:g}, beside {shown}: {trained} are trained"
    )


def initializing_adapters(model: nn.Module, others: InitializeModule) -> InitializeModule:
    """How modules get their values: of adapters A as torch draws a linear layer's, and B zeros.

    So the model begins as the one without adapters. A model's own ``_init_weights`` would draw B too.

    Args:
        model: with adapters or without.
        others: initialises all other modules.
    """
    first = {id(module) for name, module in model.named_modules() if name.endswith(_FIRST)}
    second = {id(module) for name, module in model.named_modules() if name.endswith(_SECOND)}

    def initialize(module: nn.Module) -> None:
        if id(module) in first:
            nn.init.kaiming_uniform_(module.get_parameter("weight"), a=math.sqrt(5))
        elif id(module) in second:
            nn.init.zeros_(module.get_parameter("weight"))
        else:
            others(module)

    return initialize


def plain_name(name: str) -> str:
    """Name of a tensor in the model without adapters; that of an adapter stays."""
    return name.replace(_BASE, ".")


def is_adapter(name: str) -> bool:
    """Whether a tensor of a model with adapters is one's."""
    return f"{_FIRST}." in name or f"{_SECOND}." in name


def adapted_layers(names: Iterable[str]) -> list[str]:
    """Names of the layers that have adapters, from names of tensors."""
    return [name.removesuffix(f"{_FIRST}.weight") for name in names if name.endswith(f"{_FIRST}.weight")]


def adapter_names(layer: str) -> tuple[str, str]:
    """Names of a layer's A, [rank, inputs], and B, [outputs, rank]."""
    return f"{layer}{_FIRST}.weight", f"{layer}{_SECOND}.weight"


def stored_names(wanted: Collection[str], stored: Collection[str]) -> dict[str, str]:
    """Under which name each tensor of a model with adapters lies in weights that may have none; those that lie there.

    Args:
        wanted: names of the model's tensors.
        stored: names of the weights'.
    """
    candidates = {name: name if name in stored else plain_name(name) for name in wanted}
    return {name: other for name, other in candidates.items() if other in stored}


def check_stored_adapters(
    wanted: Collection[str], stored: Collection[str], settings: LoraConfig, of_stored: Mapping[str, Any], source: str
) -> None:
    """Refuse adapters of another run that would be left out, or have another effect.

    Args:
        wanted: names of the model's tensors.
        stored: names of the other run's.
        settings: of the model's adapters.
        of_stored: section ``model`` of the other run's configuration.
        source: what to call the other run.

    Raises:
        UserError: they would.
    """
    layers, here = adapted_layers(stored), adapted_layers(wanted)
    if not layers:
        return
    theirs = LoraConfig.model_validate(of_stored.get("lora", {}))
    remedy = "write its merged model by `shardline export --merge`, and name that as model.pretrained"
    if sorted(layers) != sorted(here):
        which = f"those of {len(here)} others" if here else "none, since model.lora.rank=0"
        raise UserError(
            f"{source} has adapters (LoRA) of {len(layers)} layers, such as {layers[0]}, but this run has {which}; "
            f"set model.lora as there, or {remedy}."
        )
    if (theirs.rank, theirs.scale) != (settings.rank, settings.scale):
        raise UserError(
            f"{source} has adapters (LoRA) of rank {theirs.rank} scaled by {theirs.scale:g}, but model.lora says rank "
            f"{settings.rank} and {settings.scale:g}, with which they are others; set it as there, or {remedy}."
        )


def _target_layers(model: nn.Module, settings: ModelConfig, body: Collection[str]) -> list[str]:
    """Names of the layers that get adapters, in the model's order.

    Raises:
        UserError: a target matches none.
    """
    from transformers.pytorch_utils import Conv1D

    # What a subclass computes may be no product; and some, as inside torch's attention, are never called.
    layers = {name: module for name, module in model.named_modules() if type(module) in (nn.Linear, Conv1D)}
    if settings.new_head:
        # All of a head that is new is trained.
        layers = {name: module for name, module in layers.items() if f"{name}.weight" in body}
    uses = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    shared = {name for name, module in layers.items() if uses[id(module.weight)] > 1}
    found: set[str] = set()
    for target in settings.lora.targets:
        if target == ALL_LINEAR:
            matched = {name for name in layers if f"{name}.weight" in body and name not in shared}
        else:
            matched = {name for name in layers if fnmatchcase(name, target) or f".{name}".endswith(f".{target}")}
        if not matched:
            there = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in layers)) or "none"
            raise UserError(
                f"model.lora.targets: {target} matches no linear layer of this {type(model).__name__}; there are "
                f"{there}, and * stands for any characters."
            )
        if of_both := sorted(matched & shared):
            raise UserError(
                f"model.lora.targets: {target} matches {of_both[0]}, whose weight the model uses in another place too, "
                "where no adapter would be; name a narrower pattern."
            )
        found |= matched
    return [name for name in layers if name in found]


def _inject(model: nn.Module, settings: LoraConfig, names: list[str]) -> None:
    # Loads torchao where that is installed, and takes seconds.
    import peft

    adapters = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha_or_default,
        lora_dropout=settings.dropout,
        # An expression, since of a name in a list it takes all that end like it.
        target_modules="|".join(map(re.escape, names)),
        init_lora_weights=False,
    )
    try:
        with torch.device("meta"), warnings.catch_warnings():
            # Of layers that hold their weights the other way round, which it then does right.
            warnings.simplefilter("ignore")
            peft.inject_adapter_in_model(adapters, model)
    except ValueError as error:
        raise UserError(f"model.lora.targets: peft refuses: {str(error).splitlines()[0]}") from None
    assert sorted(adapted_layers(model.state_dict())) == sorted(names), "peft has put adapters where they belong"
