"""What training with adapters (LoRA) leaves: merged into the weights, or by themselves for peft."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

from sharding.batch_norm import has_batch_norm
from sharding.ranks.errors import UserError
from trainer.checkpoint.reader import CheckpointReader
from trainer.config import RunConfig
from trainer.files.storage import CheckpointPath
from trainer.model.lora import adapted_layers, adapter_names, is_adapter, plain_name
from trainer.model.new_head import body_of

_PREFIX = "base_model.model."
"""What peft puts before a model's own names."""
_WEIGHTS = "adapter_model.safetensors"
# By which peft's own classes know themselves.
_KINDS = {
    "causal-lm": "CAUSAL_LM",
    "sequence-classification": "SEQ_CLS",
    "token-classification": "TOKEN_CLS",
}


class ModelWeights(Protocol):
    """Weights that can be read by name."""

    @property
    def folder(self) -> CheckpointPath:
        """Where they lie, to speak of."""

    def parameter_names(self) -> list[str]:
        """Names of the model's tensors."""

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each by its name."""

    def parameter_bytes(self, name: str) -> int:
        """Size of one."""

    def read_parameter(self, name: str, *, averaged: bool = False) -> torch.Tensor:
        """One of them, whole, on the CPU."""


class MergedWeights:
    """The weights of a checkpoint whose adapters are added to what they stand beside, under the names that this has."""

    def __init__(self, reader: CheckpointReader, scale: float, transposed: Iterable[str] = ()) -> None:
        """Bind to a checkpoint.

        Args:
            reader: the checkpoint.
            scale: what an adapter's output is multiplied by.
            transposed: layers that hold their weight as [inputs, outputs].
        """
        self._reader = reader
        self._scale = scale
        self._transposed = frozenset(transposed)
        self._stored = {plain_name(name): name for name in reader.parameter_names() if not is_adapter(name)}
        self._layers = {f"{layer}.weight": layer for layer in adapted_layers(reader.parameter_names())}

    @property
    def folder(self) -> CheckpointPath:
        """See ModelWeights."""
        return self._reader.folder

    def parameter_names(self) -> list[str]:
        """See ModelWeights."""
        return list(self._stored)

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """See ModelWeights."""
        shapes = self._reader.parameter_shapes()
        return {name: shapes[stored] for name, stored in self._stored.items()}

    def parameter_bytes(self, name: str) -> int:
        """See ModelWeights."""
        return self._reader.parameter_bytes(self._stored[name])

    def read_parameter(self, name: str, *, averaged: bool = False) -> torch.Tensor:
        """See ModelWeights; W + scale x B A, computed in fp32."""
        weight = self._reader.read_parameter(self._stored[name], averaged=averaged)
        if name not in self._layers:
            return weight
        layer = self._layers[name]
        first, second = (self._reader.read_parameter(n, averaged=averaged).float() for n in adapter_names(layer))
        change = (second @ first) * self._scale
        return (weight.float() + (change.T if layer in self._transposed else change)).to(weight.dtype)

    def take_apart(self, model: nn.Module, *, averaged: bool) -> None:
        """Compute as training did: with the weights as they are stored, and what adapters make of inputs added.

        Args:
            model: with merged weights, in evaluation mode, where nothing is dropped.
            averaged: whether these are moving averages.
        """
        for name, layer in self._layers.items():
            module = model.get_submodule(layer)
            module.get_parameter("weight").data = self._reader.read_parameter(self._stored[name], averaged=averaged)
            pair = [self._reader.read_parameter(one, averaged=averaged) for one in adapter_names(layer)]
            module.register_forward_hook(_adding(pair[0], pair[1], self._scale))


def _adding(first: torch.Tensor, second: torch.Tensor, scale: float) -> Callable[[nn.Module, Any, Any], torch.Tensor]:
    def hook(_module: nn.Module, args: Any, output: Any) -> torch.Tensor:
        changed: torch.Tensor = output + scale * functional.linear(functional.linear(args[0], first), second)
        return changed

    return hook


def merged_weights(reader: CheckpointReader, model: nn.Module, config: RunConfig) -> ModelWeights:
    """The weights of a run as its model without adapters has them: the checkpoint itself where there are none."""
    if not config.model.lora.rank:
        return reader
    return MergedWeights(reader, config.model.lora.scale, _transposed_layers(model))


def write_adapters(
    reader: CheckpointReader, model: nn.Module, config: RunConfig, folder: Path, *, averaged: bool
) -> None:
    """Write the adapters of a checkpoint, and a new head, as peft's ``PeftModel.from_pretrained`` loads them.

    Args:
        reader: the checkpoint.
        model: the run's model without adapters and without memory.
        config: the run's.
        folder: where to.
        averaged: whether to take the moving average of the weights.

    Raises:
        UserError: peft is not installed, or would lose something of the head.
    """
    try:
        from peft import LoraConfig
    except ImportError:
        raise UserError(
            "--adapter writes what peft loads, and needs it, but it is not installed; install it with pip install "
            "'shardline[lora]', or give --merge."
        ) from None
    settings, layers = config.model.lora, adapted_layers(reader.parameter_names())
    body = body_of(model)
    of_head = [name for name in reader.parameter_names() if not is_adapter(name) and plain_name(name) not in body]
    heads = _trained_modules(model, of_head) if config.model.new_head else []
    if any(has_batch_norm(model.get_submodule(name)) for name in heads):
        raise UserError(
            f"--adapter: the head of {type(model).__name__} has batch normalisation, whose statistics peft does not "
            "keep; give --merge."
        )
    adapters = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha_or_default,
        lora_dropout=settings.dropout,
        target_modules=_shortest_names(model, layers),
        modules_to_save=heads or None,
        fan_in_fan_out=bool(set(layers) & set(_transposed_layers(model))),
        base_model_name_or_path=_base_model(config),
        # A class of peft's own for a classifier would expect a head.
        task_type=_KINDS.get(config.task.name) if heads or config.task.name == "causal-lm" else None,
        inference_mode=True,
    )
    names = {name: name.replace(".default.", ".") for layer in layers for name in adapter_names(layer)}
    if heads:
        names |= {name: name for name in of_head}
    tensors = {f"{_PREFIX}{there}": reader.read_parameter(name, averaged=averaged) for name, there in names.items()}
    save_file(tensors, folder / _WEIGHTS, {"format": "pt"})
    adapters.save_pretrained(folder)


def _base_model(config: RunConfig) -> str | None:
    """What peft loads the model from; None where it is in another run, which only an export makes a model of."""
    pretrained = config.model.pretrained
    if pretrained is None or config.checkpoint.from_ is not None:
        return None
    # Whoever loads the adapters stands elsewhere.
    return str(Path(pretrained).resolve()) if Path(pretrained).is_dir() else pretrained


def _transposed_layers(model: nn.Module) -> list[str]:
    from transformers.pytorch_utils import Conv1D

    return [name for name, module in model.named_modules() if isinstance(module, Conv1D)]


def _shortest_names(model: nn.Module, layers: list[str]) -> list[str]:
    """Last parts of names, as other programs look for them, where these mean the same layers and no others."""
    parts = sorted({layer.rpartition(".")[2] for layer in layers})
    meant = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in parts}
    return parts if meant == set(layers) else layers


def _trained_modules(model: nn.Module, names: list[str]) -> list[str]:
    """The uppermost modules all of whose parameters are among some."""
    whole = [
        name
        for name, module in model.named_modules()
        if name and (own := [f"{name}.{inner}" for inner, _ in module.named_parameters()]) and set(own) <= set(names)
    ]
    return [name for name in whole if not any(name.startswith(f"{other}.") for other in whole)]


def refuse_form(reader: CheckpointReader, config: RunConfig, form: str | None) -> None:
    """Refuse a form of export that a run does not have, or a run that has two and is not told which.

    Args:
        reader: the checkpoint.
        config: the run's.
        form: ``adapter`` or ``merged``; None where none was asked for.

    Raises:
        UserError: it does not fit.
    """
    rank = config.model.lora.rank
    if rank and form is None:
        raise UserError(
            f"checkpoint {reader.folder} has adapters (model.lora.rank={rank}); give --merge for a whole model, or "
            "--adapter for what peft puts beside the one that it was trained on."
        )
    if form is not None and not rank:
        option = "--adapter" if form == "adapter" else "--merge"
        raise UserError(
            f"{option}: checkpoint {reader.folder} has no adapters (model.lora.rank=0), and is whole as it is; leave "
            "it out."
        )
