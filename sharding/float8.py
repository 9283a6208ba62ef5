"""Matrix products of blocks in 8-bit floating point, by torchao."""

from dataclasses import replace

import torch
from torch import nn

from sharding.blocks import find_blocks
from sharding.config import FLOAT8_MULTIPLE, Float8Recipe
from sharding.ranks.errors import UserError

LEAST_CAPABILITY: dict[Float8Recipe, tuple[int, int]] = {"tensorwise": (8, 9), "rowwise": (9, 0)}
"""Compute capability of the first GPUs with such products, and with one scale for each row."""


def check_float8(model: nn.Module, recipe: Float8Recipe, device: torch.device) -> None:
    """Assert that a model has layers for products in 8 bits, and the device such products.

    A CPU, which rounds to 8 bits and multiplies in more, passes.

    Args:
        model: the whole model; it may be on the meta device.
        recipe: what has one scale.
        device: where it computes.

    Raises:
        UserError: no layer fits, or the GPU is too old.
    """
    if not any(is_fit(module) for _, block in find_blocks(model) for module in block.modules()):
        raise UserError(
            f"precision.compute=fp8: no block of {type(model).__name__} has a linear layer whose sizes are multiples "
            f"of {FLOAT8_MULTIPLE}; use precision.compute=bf16, or another model."
        )
    if device.type != "cuda":
        return
    found, least = torch.cuda.get_device_capability(device), LEAST_CAPABILITY[recipe]
    if found < least:
        raise UserError(
            f"precision.compute=fp8 with precision.fp8_recipe={recipe} needs a GPU of compute capability "
            f"{least[0]}.{least[1]} or newer, but {torch.cuda.get_device_name(device)} has {found[0]}.{found[1]}; "
            "use precision.compute=bf16."
        )


def is_fit(module: nn.Module) -> bool:
    """Whether a module is a plain linear layer whose sizes kernels take."""
    # A subclass may do more than its product.
    return type(module) is nn.Linear and not (
        module.in_features % FLOAT8_MULTIPLE or module.out_features % FLOAT8_MULTIPLE
    )


def convert_linear_layers(block: nn.Module, recipe: Float8Recipe, device: torch.device) -> None:
    """Let the linear layers of a block multiply in 8 bits.

    Inputs, weights and gradients are scaled by their largest value, of the whole tensor or of each row, and rounded
    before each of a layer's three products (Micikevicius et al., "FP8 Formats for Deep Learning", 2022). Parameters
    stay as they are, with their names, so a checkpoint does not know of it. Layers that do not fit are left alone. This
    must come before compilation and sharding.

    Args:
        block: a transformer block with its initial values.
        recipe: what has one scale.
        device: where it computes; on a CPU products are of rounded values, but in more bits.
    """
    # Imports Triton and half of torch's compiler.
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    config = replace(Float8LinearConfig.from_recipe_name(recipe), emulate=device.type != "cuda")
    convert_to_float8_training(block, module_filter_fn=lambda module, _name: is_fit(module), config=config)
