"""Recomputing activations of blocks in the backward pass instead of keeping them."""

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from sharding.config import ActivationCheckpointingConfig

_aten = torch.ops.aten
_ATTENTION = {
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
}
_MATRIX_PRODUCTS = {_aten.mm.default, _aten.addmm.default}


def checkpoint_activations(block: nn.Module, index: int, config: ActivationCheckpointingConfig) -> None:
    """Make the index-th block recompute its activations, if the configuration says so.

    ``forward`` is replaced on the instance rather than wrapped in a module, so parameter names stay as they are.
    This must come before compilation and sharding: the hooks of ``fully_shard`` then stay outside the recomputation.
    """
    if config.mode == "none" or (config.mode == "every_n" and index % config.every_n):
        return
    forward = block.forward
    options: dict[str, Any] = {"use_reentrant": False}
    if config.mode == "selective":
        options["context_fn"] = _selective_contexts

    is_frozen = not any(parameter.requires_grad for parameter in block.parameters())

    def checkpointed_forward(*args: Any, **kwargs: Any) -> Any:
        # A frozen block before all that is trained keeps nothing, and compiled it would have nothing to recompute for.
        has_gradient = not is_frozen or any(_has_gradient(value) for value in (*args, *kwargs.values()))
        if not (torch.is_grad_enabled() and has_gradient):
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, **options, **kwargs)

    block.forward = checkpointed_forward


def _has_gradient(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad


def _selective_contexts() -> tuple[Any, Any]:
    return create_selective_checkpoint_contexts(_save_attention_and_every_second_product())


def _save_attention_and_every_second_product() -> Callable[..., CheckpointPolicy]:
    # The forward pass and the recomputation each count their own products, so both take the same decisions.
    num_products: dict[bool, int] = defaultdict(int)

    def policy(seen: dict[bool, int], context: Any, operator: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
        if operator in _ATTENTION:
            return CheckpointPolicy.MUST_SAVE
        if operator in _MATRIX_PRODUCTS:
            seen[context.is_recompute] += 1
            if seen[context.is_recompute] % 2:
                return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    return partial(policy, num_products)
