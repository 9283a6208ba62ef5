"""Recomputing activations of blocks in the backward pass instead of keeping them."""

from collections import defaultdict
from collections.abc import Callable
from functools import cache, partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from sharding.config import ActivationCheckpointingConfig

_Kind = Literal["attention", "product", "batched product", "other"]

# By name, for a release or a machine does not have all of them: flash-attn's own are there where it is installed.
_ATTENTION = {
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_fused_attention_overrideable",
    "aten::_flash_attention_forward",
    "aten::_efficient_attention_forward",
    "aten::_cudnn_attention_forward",
    "torch_attn::_varlen_attn",
    "flash_attn::_flash_attn_forward",
    "flash_attn::_flash_attn_varlen_forward",
    "flash_attn_3::fwd",
    "flex_attention",
}
_PRODUCTS = {"aten::mm", "aten::addmm", "aten::_scaled_mm"}
_BATCHED_PRODUCTS = {"aten::bmm", "aten::baddbmm", "aten::_grouped_mm", "aten::_scaled_grouped_mm"}


def checkpoint_activations(block: nn.Module, index: int, config: ActivationCheckpointingConfig) -> None:
    """Make the index-th block recompute its activations, if the configuration says so.

    ``forward`` is replaced on the instance rather than wrapped in a module, so parameter names stay as they are.
    This must come before compilation and sharding: the hooks of ``fully_shard`` then stay outside the recomputation.
    """
    if config.mode in ("none", "budget") or (config.mode == "every_n" and index % config.every_n):
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


def keep_within_budget(block: nn.Module, config: ActivationCheckpointingConfig) -> None:
    """Have the compiler keep no more of a block than the configuration says, if it does; after ``block.compile``."""
    compiled = block._compiled_call_impl
    if config.mode != "budget" or compiled is None:
        return
    # Loaded with the compiler, and only then.
    from torch._functorch import config as compiler_config

    def call_within_budget(*args: Any, **kwargs: Any) -> Any:
        # Read when a call is compiled, which may be any: set for all blocks alone, and for nothing else that is.
        with compiler_config.patch(activation_memory_budget=config.memory_budget):
            return compiled(*args, **kwargs)

    block._compiled_call_impl = call_within_budget


def _has_gradient(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad


def _selective_contexts() -> tuple[Any, Any]:
    return create_selective_checkpoint_contexts(_save_attention_and_every_second_product())


def _save_attention_and_every_second_product() -> Callable[..., CheckpointPolicy]:
    # The forward pass and the recomputation each count their own products, so both take the same decisions.
    num_products: dict[tuple[_Kind, bool], int] = defaultdict(int)

    def policy(
        seen: dict[tuple[_Kind, bool], int], context: Any, operator: Any, *_args: Any, **_kwargs: Any
    ) -> CheckpointPolicy:
        kind = _kind(operator)
        if kind == "attention":
            return CheckpointPolicy.MUST_SAVE
        if kind == "other":
            return CheckpointPolicy.PREFER_RECOMPUTE
        seen[kind, context.is_recompute] += 1
        is_odd = seen[kind, context.is_recompute] % 2 == 1
        # Of batched ones the second: the first has scores of attention, whose size is quadratic in the length, or what
        # experts make wide.
        return CheckpointPolicy.MUST_SAVE if is_odd == (kind == "product") else CheckpointPolicy.PREFER_RECOMPUTE

    return partial(policy, num_products)


@cache
def _kind(operator: Any) -> _Kind:
    """What an operator, or a higher-order one, is to the policy."""
    name = operator.name()
    if name in _ATTENTION:
        return "attention"
    if name in _PRODUCTS:
        return "product"
    return "batched product" if name in _BATCHED_PRODUCTS else "other"
