"""A folder that `transformers` loads: configuration and weights, under the names that it stores them by."""

import json
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from sharding.part import Box, whole_box
from sharding.ranks.errors import UserError
from trainer.deploy.signature import Dtype
from trainer.deploy.trained_model import TrainedModel, class_of
from trainer.model.pretrained import stored_by_name, tied_names
from trainer.model.stored_tensor import StoredTensor

_MAX_FILE_BYTES = 4 * 2**30

DTYPES: dict[Dtype, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""torch's name of each format."""


def refuse_other_models(trained: TrainedModel) -> None:
    """Assert that a model is one of transformers.

    Raises:
        UserError: it is not.
    """
    from transformers import PreTrainedModel

    if not isinstance(trained.model, PreTrainedModel):
        raise UserError(
            f"task.name={trained.config.task.name} trains {class_of(trained.model)}, which is no model of "
            "transformers, so that nothing could load an export of it by --format hf; give --format onnx or --format "
            "torch-export."
        )


def write_hf_folder(trained: TrainedModel, work: Path, dtype: Dtype = "fp32") -> None:
    """Write configuration and weights; tensors pass through memory one file at a time.

    Args:
        trained: the model.
        work: where to; has the tokenizer.
        dtype: format of the weights.

    Raises:
        UserError: `transformers` would make another model of it, or none.
    """
    _write_weights(describe_hf_folder(trained, work, dtype), work, DTYPES[dtype])


def describe_hf_folder(trained: TrainedModel, work: Path, dtype: Dtype = "fp32") -> dict[str, StoredTensor]:
    """Write all but the weights, and give these under the names that they are to have, each still to be read.

    Args:
        trained: the model.
        work: where to; has the tokenizer.
        dtype: format that the weights are to have.

    Raises:
        UserError: `transformers` would make another model of it, or none.
    """
    refuse_other_models(trained)
    _write_configuration(trained, DTYPES[dtype], work)
    tensors = _named_as_saved(trained)
    check_reloads(trained, tensors, work)
    return tensors


def _named_as_saved(trained: TrainedModel) -> dict[str, StoredTensor]:
    """The weights under the names and in the shapes that `save_pretrained` writes, each still to be read.

    `transformers` holds some of them otherwise in memory: the experts of a layer as one tensor, say.
    """
    from transformers.core_model_loading import revert_weight_conversion

    # What is cut into several is read as often.
    read = lru_cache(maxsize=1)(lambda name: trained.weights.read_parameter(name, averaged=trained.averaged))
    types = {name: tensor.dtype for name, tensor in trained.model.state_dict().items()}
    stored = {
        name: StoredTensor(shape, types.get(name, torch.float32), partial(_read_box, read, name))
        for name, shape in trained.weights.parameter_shapes().items()
    }
    reverted: dict[str, StoredTensor] = revert_weight_conversion(trained.model, stored)
    return reverted


def _read_box(read: Callable[[str], torch.Tensor], name: str, box: Box) -> torch.Tensor:
    return read(name)[box.slices]


def _write_configuration(trained: TrainedModel, dtype: torch.dtype, work: Path) -> None:
    """Write the model's configuration, and how to generate with it: also up to one of the ends of an answer."""
    from transformers.dynamic_module_utils import custom_object_save

    model, vocab_size = trained.model, trained.facts.vocab_size
    model.config.architectures = [type(model).__name__]
    model.config.dtype = dtype
    if model._auto_class is not None:
        # A class of the model's own code goes along, and its configuration's code with the configuration.
        custom_object_save(model, work, config=model.config)
    model.config.save_pretrained(work)
    if vocab_size is not None and getattr(model, "generation_config", None) is not None:
        # Ids that pad the vocabulary stand for nothing: whoever generates with the model must not draw them.
        padding = range(vocab_size, model.config.get_text_config().vocab_size)
        suppressed = {*(model.generation_config.suppress_tokens or ()), *padding}
        model.generation_config.suppress_tokens = sorted(suppressed) or None
        if trained.ends:
            model.generation_config.eos_token_id = sorted(trained.ends)
        model.generation_config.save_pretrained(work)


def check_reloads(trained: TrainedModel, stored: dict[str, StoredTensor], folder: Path) -> None:
    """Refuse an export that `from_pretrained` would make another model of; reads what is converted alone.

    Args:
        trained: the model.
        stored: its weights, as they are to be written.
        folder: where its configuration was written to.

    Raises:
        UserError: the class is not one that transformers has, or it would load some weights as others, or not at all.
    """
    import transformers

    def refused(reason: str) -> UserError:
        return UserError(
            f"checkpoint {trained.reader.folder} cannot be exported as a model of transformers: {reason}; give "
            "--format onnx or --format torch-export."
        )

    kind: Any = type(trained.model)
    if trained.model._auto_class is None and getattr(transformers, kind.__name__, None) is not kind:
        raise refused(f"{class_of(trained.model)} is no class of its own")
    trust_remote_code = trained.config.model.trust_remote_code
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        loaded = kind(config)
    expected = {name: tuple(tensor.shape) for name, tensor in loaded.state_dict().items()}
    try:
        found = stored_by_name(loaded, stored)
    except ValueError as error:
        raise refused(f"its weights {error}") from None
    for name, shape in trained.weights.parameter_shapes().items():
        there = found.get(name)
        if there is None or (there is not stored.get(name) and not _is_equal(there, trained, name)):
            raise refused(f"{kind.__name__} has another use for {name}, or none")
        if expected[name] != shape:
            raise refused(f"{name} has shape {list(shape)}, and {kind.__name__} makes it {list(expected[name])}")
    tied = tied_names(loaded)
    for name in expected:
        if not any(other in found for other in tied.get(name, [name])):
            raise refused(f"it has no {name}, which {kind.__name__} needs")


def _is_equal(there: StoredTensor, trained: TrainedModel, name: str) -> bool:
    """Whether what is loaded in place of a weight is that weight."""
    return torch.equal(read_whole(there), trained.weights.read_parameter(name, averaged=trained.averaged))


def refuse_faults(
    report: Mapping[str, Any], source: object, kind: type, remedy: str = "export the run once more"
) -> None:
    """Assert that `from_pretrained` has found all weights of a model and no others.

    Without a word it would draw the ones anew and leave the others out.

    Args:
        report: its ``output_loading_info``.
        source: what was loaded, to speak of.
        kind: the class of the model.
        remedy: what to do.

    Raises:
        UserError: it has not.
    """
    for fault, keys in sorted(report.items()):
        if keys:
            first = next(iter(keys))
            raise UserError(
                f"{source} is not a whole {kind.__name__}: {len(keys)} {fault.replace('_', ' ')}, the first being "
                f"{first if isinstance(first, str) else first[0]}; {remedy}."
            )


def read_whole(tensor: StoredTensor) -> torch.Tensor:
    """All of a tensor, on the host."""
    return tensor.read(whole_box(tuple(tensor.shape))).contiguous()


def _write_weights(tensors: dict[str, StoredTensor], work: Path, dtype: torch.dtype) -> None:
    """Shared tensors are in the checkpoint once, under the name that `transformers` ties the others to."""
    types = {name: dtype if tensor.is_floating_point() else tensor.dtype for name, tensor in tensors.items()}
    sizes = {name: tensor.numel() * types[name].itemsize for name, tensor in tensors.items()}

    def read(names: list[str]) -> dict[str, torch.Tensor]:
        return {name: read_whole(tensors[name]).to(types[name]) for name in names}

    groups: list[list[str]] = [[]]
    num_bytes = 0
    for name, size in sizes.items():
        if groups[-1] and num_bytes + size > _MAX_FILE_BYTES:
            groups.append([])
            num_bytes = 0
        groups[-1].append(name)
        num_bytes += size
    if len(groups) == 1:
        save_file(read(groups[0]), work / "model.safetensors", {"format": "pt"})
        return
    files: dict[str, str] = {}
    for index, names in enumerate(groups, start=1):
        file = f"model-{index:05d}-of-{len(groups):05d}.safetensors"
        save_file(read(names), work / file, {"format": "pt"})
        files |= dict.fromkeys(names, file)
    index_text = json.dumps({"metadata": {"total_size": sum(sizes.values())}, "weight_map": files}, indent=2)
    (work / "model.safetensors.index.json").write_text(index_text + "\n")
