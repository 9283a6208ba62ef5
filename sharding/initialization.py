"""Initial parameters as a function of the seed and their name alone.

Each rank draws a whole block, one block at a time, and then keeps its shard of it. Every draw is seeded by the run's
seed and the qualified name of the module it belongs to, so the values depend neither on the number of ranks nor on the
strategy. The naive order (shard on meta, then initialise the shards) lets each rank draw its shard from its own stream.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

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

        Floating-point memory is filled with NaN, so that what initialisation forgets is found by
        ``check_initialized``.
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
            if real.is_floating_point():
                real.fill_(torch.nan)
            if isinstance(tensor, nn.Parameter):
                real = nn.Parameter(real, requires_grad=tensor.requires_grad)
            self._replacements[id(tensor)] = (tensor, real)
        return self._replacements[id(tensor)][1]


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
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        yield


def check_initialized(module: nn.Module, name: str) -> None:
    """Assert that initialisation reached every floating-point parameter and buffer of a module tree.

    Raises:
        RuntimeError: one still holds the NaN that memory was filled with.
    """
    tensors = [*module.named_parameters(), *module.named_buffers()]
    for tensor_name, tensor in tensors:
        if tensor.is_floating_point() and not tensor.is_meta and bool(tensor.isnan().any()):
            raise RuntimeError(f"initialisation of {name or 'the model'} left {tensor_name} without values")
