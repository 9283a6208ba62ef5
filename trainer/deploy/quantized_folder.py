"""Folders of transformers whose weights have fewer bits: what they say of themselves, and how they are loaded."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sharding.ranks.errors import UserError
from trainer.deploy.hf_folder import refuse_faults


def quantization_of(folder: Path) -> str | None:
    """What ``config.json`` of a folder says that its weights were quantized by; None where they were not.

    Raises:
        UserError: there is no such file that can be read.
    """
    description = read_description(folder)
    quantization = description.get("quantization_config")
    return None if quantization is None else str(quantization.get("quant_method", "an unknown method"))


def read_description(folder: Path) -> dict[str, Any]:
    """The contents of ``config.json``.

    Raises:
        UserError: there is no such file that can be read.
    """
    file = folder / "config.json"
    try:
        description = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error}); export the run once more.") from None
    if not isinstance(description, dict):
        raise UserError(f"{file} holds no JSON object; export the run once more.")
    return description


def check_loads_here(folder: Path, *, is_cast: bool = False) -> None:
    """Assert that this installation has what loads the folder's weights, where they are quantized.

    Args:
        folder: of transformers.
        is_cast: whether weights are wanted in another format than they lie there.

    Raises:
        UserError: they are quantized by something other than torchao, torchao is not installed, or they are cast.
    """
    if not (folder / "config.json").exists() or (method := quantization_of(folder)) is None:
        return
    if is_cast:
        raise UserError(
            f"--dtype: {folder} is quantized, and its weights have the format that they lie in; leave it out."
        )
    if method != "torchao":
        raise UserError(f"{folder} is quantized by {method}, and torchao alone is known here; name another folder.")
    if find_spec("torchao") is None:
        raise UserError(
            f"{folder} is quantized by torchao, which is not installed; install it with pip install "
            "'shardline[eight-bit]'."
        )


def load_folder(folder: Path) -> Any:
    """The model of a folder as `transformers` loads it, quantized or not, in evaluation mode on the host.

    Raises:
        UserError: its class is not one of transformers', or it is not whole.
    """
    import transformers
    from safetensors import SafetensorError
    from transformers.utils.logging import disable_progress_bar

    check_loads_here(folder)
    kind = model_class(folder)
    disable_progress_bar()
    try:
        model, report = kind.from_pretrained(folder, dtype="auto", output_loading_info=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{folder} cannot be loaded: {str(error).strip().splitlines()[0]}.") from None
    refuse_faults(report, folder, kind)
    assert isinstance(model, transformers.PreTrainedModel)
    return model.eval()


def model_class(folder: Path) -> Any:
    """The class of `transformers` that the folder's model has.

    Raises:
        UserError: it has another one.
    """
    import transformers

    description = read_description(folder)
    name = (description.get("architectures") or ["nothing"])[0]
    kind = getattr(transformers, name, None)
    if description.get("auto_map") or not isinstance(kind, type):
        raise UserError(f"{folder} holds a {name}, which is no class of transformers' own; name another folder.")
    return kind
