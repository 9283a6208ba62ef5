"""A trained model in memory, as `transformers` has it."""

import tempfile
from pathlib import Path
from threading import Lock
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError

from sharding.ranks.errors import UserError
from trainer.checkpoint.reader import CheckpointReader, open_checkpoint
from trainer.deploy.allowed_code import AllowedCode
from trainer.deploy.hf_folder import DTYPES, describe_hf_folder, read_whole, refuse_faults
from trainer.deploy.quantized_folder import check_loads_here
from trainer.deploy.trained_model import check_checkpoint, open_trained
from trainer.model.stored_tensor import StoredTensor

Device = Literal["auto", "cpu", "cuda"]
LoadDtype = Literal["auto", "fp32", "bf16", "fp16"]

_NO_CODE = AllowedCode()


def load_model(
    run: str,
    step: int | None,
    *,
    averaged: bool = False,
    allowed: AllowedCode = _NO_CODE,
    device: Device = "cpu",
    dtype: LoadDtype = "auto",
) -> tuple[Any, Any]:
    """Model and tokenizer of a run's checkpoint or of an exported folder, in evaluation mode.

    Of a checkpoint it is what `from_pretrained` makes of an export: its own loader is given tensors that are read when
    it asks for them, so that no more is written than a tokenizer and a configuration.

    Args:
        run: the folder.
        step: step of the run's checkpoint; the newest if None.
        averaged: whether to take the moving average of the run's weights.
        allowed: the Python code that may run for it.
        device: where to; ``auto`` takes a GPU where there is one.
        dtype: of its weights; ``auto`` is fp32 of a checkpoint, and of a folder what lies there.

    Raises:
        UserError: there is neither a run nor a whole model in the folder, no average, no GPU, or code that is not
            allowed; or the model is not made to continue text.
    """
    place = find_device(device)
    if dtype not in get_args(LoadDtype):
        raise UserError(f"--dtype {dtype} is none of {', '.join(get_args(LoadDtype))}.")
    if is_exported_model(run):
        if averaged:
            raise UserError(f"--ema: {run} is an exported model, which has one set of weights; name the run's folder.")
        return _loaded(run, run, allowed.trust_remote_code, None, dtype, place)
    return _of_checkpoint(open_checkpoint(run, step), run, averaged, allowed, dtype, place)


def is_exported_model(folder: str) -> bool:
    """Whether a folder holds a whole model of `transformers`, and not a run."""
    return any((Path(folder) / name).exists() for name in ("model.safetensors", "model.safetensors.index.json"))


def find_device(device: Device) -> torch.device:
    """The device that is meant.

    Raises:
        UserError: it is none of those that there are to name, or this machine has none of its kind.
    """
    if device not in get_args(Device):
        raise UserError(f"--device {device} is none of {', '.join(get_args(Device))}.")
    has_gpu = torch.cuda.is_available()
    if device == "cuda" and not has_gpu:
        raise UserError("--device cuda: torch finds no GPU on this machine; give --device cpu, or auto.")
    return torch.device("cuda" if has_gpu and device != "cpu" else "cpu")


class _Unread:
    """A tensor of a checkpoint that is read where it is indexed, as `transformers` reads slices of its own files."""

    def __init__(self, tensor: StoredTensor, lock: Lock) -> None:
        self._tensor, self._lock = tensor, lock

    def __getitem__(self, index: Any) -> torch.Tensor:
        # It reads in several threads.
        with self._lock:
            return read_whole(self._tensor)[index]


def _of_checkpoint(
    reader: CheckpointReader, name: str, averaged: bool, allowed: AllowedCode, dtype: LoadDtype, place: torch.device
) -> tuple[Any, Any]:
    config = check_checkpoint(reader, averaged=averaged, allowed=allowed)
    with tempfile.TemporaryDirectory(prefix="shardline-model-") as work:
        trained = open_trained(reader, config, Path(work), averaged=averaged)
        lock = Lock()
        unread = {key: _Unread(tensor, lock) for key, tensor in describe_hf_folder(trained, Path(work)).items()}
        return _loaded(work, name, allowed.trust_remote_code, unread, dtype, place)


def _loaded(
    folder: str,
    name: str,
    trust_remote_code: bool,
    unread: dict[str, _Unread] | None,
    dtype: LoadDtype,
    place: torch.device,
) -> tuple[Any, Any]:
    """What a folder holds, with its own weights or those that are given; the model is on the device."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    given: dict[str, Any] = {"dtype": "auto" if dtype == "auto" else DTYPES[dtype], "output_loading_info": True}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        if unread is None:
            check_loads_here(Path(folder), is_cast=dtype != "auto")
            made = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust_remote_code, **given)
        else:
            made = _assembled(folder, name, unread, trust_remote_code, given)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        if "trust_remote_code" in str(error):
            reason = "it needs Python code of its own; read that, and give --trust-remote-code to run it"
        raise UserError(f"{name} cannot be loaded as a model that continues text: {reason}.") from None
    model, report = made
    _check_kind(model, name)
    refuse_faults(report, name, type(model))
    return model.eval().to(place), tokenizer


def _check_kind(model: Any, name: str) -> None:
    kinds = getattr(model.config, "architectures", None) or [type(model).__name__]
    if type(model).__name__ not in kinds:
        raise UserError(f"{name} holds a {kinds[0]}, which does not continue text; name a causal language model.")


def _assembled(
    folder: str, name: str, unread: dict[str, _Unread], trust_remote_code: bool, given: dict[str, Any]
) -> tuple[Any, Any]:
    """The model of a folder that has a configuration, by its class's own loader, with tensors from elsewhere."""
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    _check_kind(empty, name)
    model, report = type(empty).from_pretrained(None, config=config, state_dict=unread, **given)
    if model.can_generate():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model, report
