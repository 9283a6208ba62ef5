"""State that DeepSpeed's ZeRO-3 keeps in files on a local disk: what that takes, and reaching it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from sharding.ranks.errors import UserError


def keeps_files(settings: dict[str, Any]) -> bool:
    """Whether DeepSpeed's configuration keeps parameters or optimizer state in files."""
    zero = settings["zero_optimization"]
    return any(zero.get(key, {}).get("device") == "nvme" for key in ("offload_param", "offload_optimizer"))


def check_file_access() -> None:
    """Assert that DeepSpeed can read and write files without waiting.

    Raises:
        UserError: it cannot be compiled here.
    """
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible():
        raise UserError(
            "parallel.offload_parameters|offload_optimizer=nvme needs DeepSpeed's async_io, which cannot be compiled "
            "here; install libaio with its headers (Debian: libaio-dev) and a C++ compiler, or offload to cpu."
        )


def refuse_frozen_files(settings: dict[str, Any], model: nn.Module) -> None:
    """Refuse parameters in files where some are frozen: the state reads these from memory, where they would not be.

    Raises:
        UserError: it is so.
    """
    frozen = next((name for name, parameter in model.named_parameters() if not parameter.requires_grad), None)
    if frozen is not None and settings["zero_optimization"].get("offload_param", {}).get("device") == "nvme":
        raise UserError(
            f"parallel.offload_parameters=nvme keeps parameters in files, but {frozen} of {type(model).__name__} is "
            "frozen, which a checkpoint could not read from there; set parallel.offload_parameters to cpu or none."
        )


def size_buffers(settings: dict[str, Any], model: nn.Module, num_ranks: int) -> None:
    """Set the size of the buffers that parameters in files pass through, in elements, to the largest partition.

    DeepSpeed's own default, 5 buffers of 10^8 elements, is 2 GB on each rank, and refuses any larger partition.

    Args:
        settings: DeepSpeed's configuration, changed in place.
        model: the model, which may be on the meta device.
        num_ranks: ranks that each parameter is divided over.
    """
    offload = settings["zero_optimization"].get("offload_param", {})
    if offload.get("device") == "nvme":
        offload["buffer_size"] = max(-(-parameter.numel() // num_ranks) for parameter in model.parameters())


@contextmanager
def in_memory(zero: Any, group: int, *, changes: bool) -> Iterator[bool]:
    """Bring a flat partition's master and moments from their files to memory.

    Args:
        zero: DeepSpeed's stage 3 optimizer.
        group: index of the partition.
        changes: whether to write them back afterwards.

    Yields:
        Whether they are in files, so that what is in memory is gone afterwards.
    """
    if not zero._swappable_optimizer_subgroup(group):
        yield False
        return
    zero._optimizer_states_and_gradient_swap_in(group)
    yield True
    if changes:
        zero._optimizer_states_and_gradient_swap_out(group)
    else:
        zero._release_swap_buffers(group)
