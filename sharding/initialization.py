"""Initial parameters as a function of the seed and their name alone.

Each rank draws a whole block, one block at a time, and then keeps its shard of it. Every draw is seeded by the run's
seed and the qualified name of the module it belongs to, so the values depend neither on the number of ranks nor on the
strategy. The naive order (shard on meta, then initialise the shards) lets each rank draw its shard from its own stream.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from sharding.ranks.errors import UserError

_FILLED_VERSION = "_shardline_filled_version"

InitializeModule = Callable[[nn.Module], None]
"""Initialises one module's own parameters and buffers in place, drawing from torch's default generator."""


class Materializer:
    """Gives real memory to modules that were built on the meta device, keeping shared parameters shared."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # The meta tensor is kept beside its replacement, so that its id cannot be given to another tensor.
        self._replacements: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def materialize(self, module: nn.Module) -> None:
        """Replace the meta parameters and buffers of one module, not of its children, by uninitialised memory.

        The memory is filled, floating-point numbers with NaN, so that what initialisation forgets is found by
        ``check_parameters`` and ``check_buffers``.
        """
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                module._parameters[name] = self._replace(parameter)  # type: ignore[assignment]
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = self._replace(buffer)

    def _replace(self, tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in self._replacements:
            real = torch.empty_like(tensor, device=self._device)
            real.fill_(_no_value(real.dtype))
            # Integers and truth values have no NaN: what nobody has written since then has no value either.
            setattr(real, _FILLED_VERSION, real._version)
            if isinstance(tensor, nn.Parameter):
                real = nn.Parameter(real, requires_grad=tensor.requires_grad)
            self._replacements[id(tensor)] = (tensor, real)
        return self._replacements[id(tensor)][1]


def _no_value(dtype: torch.dtype) -> float | int | bool:
    """What memory of a format is filled with until initialisation has given it values."""
    if dtype.is_floating_point or dtype.is_complex:
        return math.nan
    return True if dtype is torch.bool else torch.iinfo(dtype).max


def _is_without_values(tensor: torch.Tensor) -> bool:
    if tensor.is_floating_point() or tensor.is_complex():
        return bool(tensor.isnan().any())
    is_untouched = getattr(tensor, _FILLED_VERSION, None) == tensor._version
    return is_untouched and bool((tensor == _no_value(tensor.dtype)).all())


def initialize_tree(root: nn.Module, name: str, seed: int, initialize: InitializeModule) -> None:
    """Initialise a module and all below it, children first, each under its own seed.

    Args:
        root: module whose parameters and buffers have memory.
        name: the root's qualified name in the model, "" for the model itself.
        seed: the run's seed.
        initialize: called once per module.
    """
    for child_name, child in root.named_children():
        initialize_tree(child, f"{name}.{child_name}" if name else child_name, seed, initialize)
    initialize_one(root, name, seed, initialize)


def initialize_outside_blocks(
    model: nn.Module, seed: int, initialize: InitializeModule, materializer: Materializer, blocks: Iterable[nn.Module]
) -> None:
    """Bring to life what is in no block: embeddings, final norm, head; children before parents.

    Args:
        model: the model, whose blocks are alive, and may be sharded.
        seed: the run's seed.
        initialize: called once per module.
        materializer: that of the blocks.
        blocks: the model's.

    Raises:
        UserError: a tensor was left without values, or a module initialises parameters of blocks inside it.
    """
    block_ids = {id(block) for block in blocks}
    outside: list[tuple[str, nn.Module]] = []

    def collect(module: nn.Module, name: str) -> None:
        for child_name, child in module.named_children():
            if id(child) not in block_ids:
                collect(child, f"{name}.{child_name}" if name else child_name)
        outside.append((name, module))

    collect(model, "")
    for _, module in outside:
        materializer.materialize(module)
    # A block that shares parameters with what is outside is not sharded yet.
    own = {id(p) for _, module in outside for p in module.parameters(recurse=False)}
    inside = [p for m in model.modules() if id(m) in block_ids for p in m.parameters() if id(p) not in own]
    versions = [p._version for p in inside]
    for name, module in outside:
        initialize_one(module, name, seed, initialize)
        if versions != [p._version for p in inside]:
            # A draw into a sharded block would depend on the layout.
            raise UserError(
                f"{type(module).__name__} initialises parameters of blocks inside it, which would depend on how they "
                "are divided over ranks; let each module initialise its own, in a method reset_parameters."
            )
    for name, module in outside:
        check_own_parameters(module, name)
    check_buffers(model)


def initialize_one(module: nn.Module, name: str, seed: int, initialize: InitializeModule) -> None:
    """Initialise one module under the seed that belongs to its name."""
    tensor = next((t for t in (*module.parameters(), *module.buffers())), None)
    if tensor is None:
        return
    with seeded(seed, name, tensor.device), torch.no_grad():
        initialize(module)


@contextmanager
def seeded(seed: int, name: str, device: torch.device) -> Iterator[None]:
    """Seed torch's generators from the run's seed and a name, and put their state back afterwards."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    devices = [device] if device.type == "cuda" else []
    value = int.from_bytes(digest[:8], "little") >> 1
    with torch.random.fork_rng(devices=devices):
        # Not by torch.manual_seed, because that keeps a stack trace per call where CUDA is not in use.
        torch.default_generator.manual_seed(value)
        if devices:
            torch.cuda.manual_seed_all(value)
        yield


def check_parameters(module: nn.Module, name: str) -> None:
    """Refuse a module tree of which initialisation left a parameter as the NaN that memory was filled with.

    Buffers may get their values later, from a module above.

    Args:
        module: its root, initialised and not yet sharded.
        name: the root's qualified name in the model.

    Raises:
        UserError: a parameter has no values.
    """
    for owner_name, owner in module.named_modules(prefix=name):
        check_own_parameters(owner, owner_name)


def check_own_parameters(module: nn.Module, name: str) -> None:
    """As ``check_parameters``, of one module without those below it."""
    _check_tensors(module, name, module._parameters)


def check_buffers(model: nn.Module) -> None:
    """Refuse a model that left a buffer without values; call it when all of the model is initialised.

    Raises:
        UserError: one has none.
    """
    for owner_name, owner in model.named_modules():
        _check_tensors(owner, owner_name, owner._buffers)


def _check_tensors(owner: nn.Module, owner_name: str, tensors: Mapping[str, torch.Tensor | None]) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_meta and _is_without_values(tensor):
            kind = type(owner)
            remedy = (
                f"give {kind.__qualname__} a method reset_parameters that fills them, for what a constructor fills is "
                "not kept"
            )
            if kind.__module__.partition(".")[0] in ("torch", "transformers"):
                remedy = "it has no method that would; take another module, or another model.architecture"
            full_name = f"{owner_name}.{name}" if owner_name else name
            raise UserError(
                f"initialisation left {full_name}, of {kind.__module__}.{kind.__qualname__}, without values: {remedy}."
            )
