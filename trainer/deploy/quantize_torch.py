"""The weights of a transformers folder in fewer bits, by torchao."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sharding.ranks.errors import UserError
from trainer.config.quantization import QuantizationMethod
from trainer.deploy.quantized_folder import model_class, quantization_of

_PROBE_LIMIT_S = 120
_INT4_GROUP_SIZE = 128


def quantize_transformers(folder: Path, to: Path, method: QuantizationMethod) -> float:
    """Write a folder's model with quantized weights, such that ``from_pretrained`` loads it wherever torchao is.

    Linear layers are quantized, those of an output whose weights are an embedding's too left as they are.

    Args:
        folder: the model, as ``save_pretrained`` writes it.
        to: where its configuration and weights are written to; must exist.
        method: how.

    Returns:
        Share of the parameters that are quantized.

    Raises:
        UserError: torchao is not installed or has no kernel here, the folder is quantized or not of a class of
            transformers' own, or there is no weight that could be quantized.
    """
    try:
        from transformers import TorchAoConfig
        from transformers.utils.logging import disable_progress_bar

        config = torchao_config(method)
    except ImportError:
        raise UserError(
            f"--method {method} of a transformers folder needs torchao, which is not installed; install it with pip "
            "install 'shardline[eight-bit]'."
        ) from None
    if (present := quantization_of(folder)) is not None:
        raise UserError(f"{folder} is quantized already, by {present}; name the folder that it was made of.")
    kind = model_class(folder)
    if method == "int4-weight":
        _refuse_without_kernel(method)
    disable_progress_bar()
    model = kind.from_pretrained(folder, dtype="auto", quantization_config=TorchAoConfig(config))
    share = quantized_share(model)
    if not share:
        raise UserError(
            f"--method {method}: a {kind.__name__} has no linear layer that torchao quantizes; export --format onnx "
            "and quantize that, or serve the model as it is."
        )
    model.save_pretrained(to)
    return share


def torchao_config(method: QuantizationMethod) -> Any:
    """What torchao is told to do by a method.

    Args:
        method: how weights are quantized.
    """
    from torchao.quantization import (
        Int4WeightOnlyConfig,
        Int8DynamicActivationInt8WeightConfig,
        Int8WeightOnlyConfig,
    )

    # Or they would change settings of the compiler's for the whole process.
    if method == "int8-weight":
        return Int8WeightOnlyConfig(set_inductor_config=False)
    if method == "int8-dynamic":
        # The products of 8 bits each overflow on processors without VNNI, and nobody knows where a folder will be run.
        return Int8DynamicActivationInt8WeightConfig(set_inductor_config=False, reduce_range=True)
    return Int4WeightOnlyConfig(
        group_size=_INT4_GROUP_SIZE, int4_packing_format="tile_packed_to_4d", set_inductor_config=False
    )


def quantized_share(model: nn.Module) -> float:
    """Share of a model's parameters that torchao has quantized."""
    from torchao.utils import TorchAOBaseTensor

    sizes = [(parameter.numel(), isinstance(parameter, TorchAOBaseTensor)) for parameter in model.parameters()]
    return sum(size for size, is_quantized in sizes if is_quantized) / max(sum(size for size, _ in sizes), 1)


def _refuse_without_kernel(method: QuantizationMethod) -> None:
    """Assert that a product can be computed here, in a process of its own, since kernels that do not fit may abort."""
    command = [sys.executable, "-c", f"from {__name__} import run_product; run_product({method!r})"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PROBE_LIMIT_S, check=False)
    except subprocess.TimeoutExpired:
        reason = f"no answer in {_PROBE_LIMIT_S} s"
    else:
        if done.returncode == 0:
            return
        said = done.stderr.strip().splitlines()
        reason = said[-1] if said else f"exit status {done.returncode}"
    raise UserError(
        f"--method {method}: torchao has no kernel for it that runs here ({reason}); export --format onnx and quantize "
        "that, which runs on any processor, or use --method int8-weight."
    )


def run_product(method: QuantizationMethod) -> None:
    """Compute the product of a small quantized layer, on a GPU if there is one; fails where no kernel does."""
    from torchao.quantization import quantize_

    device = "cuda" if torch.cuda.is_available() else "cpu"
    layer = nn.Linear(256, 256, device=device, dtype=torch.bfloat16)
    quantize_(layer, torchao_config(method))
    with torch.no_grad():
        layer(torch.ones(2, 256, device=device, dtype=torch.bfloat16)).float().sum().item()
