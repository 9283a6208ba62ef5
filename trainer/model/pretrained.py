"""Pretrained weights, read by each rank as the slices that it holds."""

import copy
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from sharding.engine import Engine
from sharding.part import Box, Part
from sharding.ranks.errors import UserError
from sharding.state import MODEL_PREFIX
from trainer.model.new_head import body_of, describe_new_head, new_head, shapes_of
from trainer.model.new_rows import with_new_rows
from trainer.model.stored_tensor import StoredTensor

_FILE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


class PretrainedWeights:
    """The weights of a `transformers` folder under the names of a model's own tensors.

    transformers stores other names and shapes than it holds in memory: each expert by itself, names of former versions.
    Its own conversions say what becomes of them; they are carried out on tensors that are not read, so that a rank
    later reads its slices alone.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        pretrained_name: Callable[[str], str] = lambda name: name,
        *,
        has_new_head: bool = False,
        may_have_none: bool = False,
        resizes_vocabulary: bool = False,
        setting: str = "model.pretrained",
    ) -> None:
        """Find out where each tensor of a model lies.

        Args:
            name: a folder, or the name of a model of the hub.
            model: the model, before it is sharded; on the meta device or not.
            pretrained_name: the name there of one of the model's tensors.
            has_new_head: whether a head may be lacking, or have another shape: it keeps its initial values.
            may_have_none: whether it is right all the same if nothing is lacking.
            resizes_vocabulary: whether rows of new tokens are added.
            setting: what names it, to speak of.

        Raises:
            UserError: there are no safetensors files, they lack a tensor or have it in another shape, or they are
                quantized.
        """
        self._source = f"{setting}={name}"
        # Whoever trains the model may give it another head; whoever runs it needs the one that it has.
        self._may_have_new_head = setting == "model.pretrained"
        self.stored = _stored_tensors(find_folder(name, setting), self._source)
        try:
            self.tensors = _renamed(stored_by_name(model, self.stored), self.stored, model, pretrained_name)
        except ValueError as error:
            raise UserError(f"{self._source} {error}; the folder is not of one model.") from None
        self.new_rows = ""
        """What tokens were added, in one line; empty where none was."""
        if resizes_vocabulary:
            self.tensors, self.new_rows = with_new_rows(model, self.tensors)
        quantization = getattr(getattr(model, "config", None), "quantization_config", None)
        if quantization is not None:
            raise UserError(
                f"{self._source} is quantized, and its weights cannot be trained as they are; "
                "name a folder of the same model in bf16 or fp32."
            )
        self._tied = tied_names(model)
        expected: dict[str, Any] = dict(model.state_dict(keep_vars=True))
        ignored = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
        self.new_head = ""
        """What has no weights there, in one line; empty where everything has."""
        if has_new_head:
            self._leave_out_head(model, expected, may_be_none=may_have_none)
            is_there = {key: any(other in self.tensors for other in self._tied.get(key, [key])) for key in expected}
            expected = {key: tensor for key, tensor in expected.items() if is_there[key]}
        missing = []
        for key, tensor in expected.items():
            found = next((other for other in self._tied.get(key, [key]) if other in self.tensors), None)
            is_optional = not isinstance(tensor, nn.Parameter) and any(re.search(pattern, key) for pattern in ignored)
            if found is None and not is_optional:
                missing.append(key)
            elif found is not None:
                self._check(found, tuple(tensor.shape), tensor.dtype)
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            is_head = self._may_have_new_head and missing[0] not in body_of(model)
            remedy = "; model.new_head=true initialises a head that is lacking" if is_head else ""
            raise UserError(
                f"{self._source} has no weights for {missing[0]}{more}; it was saved by another model class, "
                f"or not all of it is there{remedy}."
            )

    def load_into(self, engine: Engine, own_name: Callable[[str], str] = str) -> None:
        """Fill an engine's parameters; only this rank's slices are read.

        Args:
            engine: holds the model, or one that was made of it.
            own_name: what the model that was looked at calls a tensor of the engine's. One that it does not have keeps
                its values.

        Raises:
            UserError: weights that the model shares differ in the files.
        """
        engine.load_state(lambda part: self.read_into(part, own_name), with_optimizer=False)

    def _leave_out_head(self, model: nn.Module, expected: Mapping[str, Any], *, may_be_none: bool) -> None:
        """Forget tensors of a head in another shape, and note what is to be initialised.

        Raises:
            UserError: see ``new_head``.
        """
        ignored = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
        wanted, stored = shapes_of(expected), shapes_of(self.tensors)
        for names in self._tied.values():
            # What is stored under one name of a shared tensor is there for all.
            shape = next((stored[name] for name in names if name in stored), None)
            stored |= {name: shape for name in names if shape is not None}
        optional = {
            key
            for key, tensor in expected.items()
            if not isinstance(tensor, nn.Parameter) and any(re.search(pattern, key) for pattern in ignored)
        }
        wanted = {key: shape for key, shape in wanted.items() if key in stored or key not in optional}
        source = self._source
        names = new_head(wanted, stored, body_of(model), source, may_be_none=may_be_none)
        if names:
            self.new_head = describe_new_head(names, wanted, stored, source)
        for name in names:
            self.tensors.pop(name, None)

    def _check(self, key: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        source = self.tensors[key]
        if tuple(source.shape) != shape:
            remedy = ", or model.new_head=true initialises a head for it" if self._may_have_new_head else ""
            raise UserError(
                f"{self._source} has {key} in shape {list(source.shape)}, but its configuration makes it "
                f"{list(shape)}; the folder is not of one model{remedy}."
            )
        if dtype.is_floating_point and not (source.dtype.is_floating_point and source.dtype.itemsize > 1):
            raise UserError(
                f"{self._source} has {key} in {str(source.dtype).removeprefix('torch.')}, which is "
                "quantized; name a folder of the same model in bf16 or fp32."
            )

    def read_into(self, part: Part, own_name: Callable[[str], str] = str) -> None:
        """Fill a part of the canonical state; see ``load_into``."""
        wanted = own_name(part.name.removeprefix(MODEL_PREFIX))
        names = [name for name in self._tied.get(wanted, [wanted]) if name in self.tensors]
        for box, piece in part.pieces():
            if names and piece.numel():
                piece.copy_(self._read(names, box))

    def _read(self, names: list[str], box: Box) -> torch.Tensor:
        """A box of a tensor that is stored under one or more names."""
        values = self.tensors[names[0]].read(box)
        for other in names[1:]:
            if not torch.equal(values, self.tensors[other].read(box)):
                raise UserError(
                    f"{self._source} has different weights for {names[0]} and {other}, which its "
                    "configuration ties to one another; set tie_word_embeddings to false in its config.json."
                )
        return values


def _renamed(
    by_name: dict[str, StoredTensor],
    stored: dict[str, StoredTensor],
    model: nn.Module,
    pretrained_name: Callable[[str], str],
) -> dict[str, StoredTensor]:
    """The same with those tensors of a model that a task finds under other names."""
    other = {name: pretrained_name(name) for name in model.state_dict()}
    found = stored | by_name
    return by_name | {name: found[there] for name, there in other.items() if there != name and there in found}


def stored_by_name(model: nn.Module, stored: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """What lies in files, under the names that a model gives its tensors, converted as `from_pretrained` would.

    Args:
        model: the model, before it is sharded.
        stored: the files' tensors by the names that they have there.

    Raises:
        ValueError: tensors that make up one do not fit together.
    """
    from transformers import PreTrainedModel

    if isinstance(model, PreTrainedModel):
        return _converted(model, stored)
    found = {}
    for name in model.state_dict():
        # Files of a bare base model leave out the prefix under which a task's model holds it.
        key = next((key for key in (name, name.partition(".")[2]) if key in stored), None)
        if key is not None:
            found[name] = stored[key]
    return found


def _converted(model: Any, stored: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Follows ``transformers.core_model_loading.convert_and_load_state_dict_in_model``, which loads whole tensors."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    of_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    expected = model.state_dict()
    prefix = model.base_model_prefix
    pending: dict[str, Any] = {}
    for key in sorted(stored, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, expected)
        if name not in expected and key in expected:
            name, pattern = rename_source_key(key, [], [], prefix, expected)
        if name not in expected:
            continue
        if pattern is None:
            conversion: Any = pending.setdefault(name, WeightRenaming(key, name))
        else:
            conversion = pending.setdefault(name, copy.deepcopy(of_pattern[pattern]))
        conversion.add_tensor(name, key, pattern or key, stored[key])
    converted: dict[str, StoredTensor] = {}
    with torch.no_grad():
        for name, conversion in pending.items():
            try:
                made = conversion.convert(name, model=model, config=model.config)
            except (RuntimeError, ValueError, LookupError, AttributeError, TypeError) as error:
                raise ValueError(f"cannot be converted to {name}: {str(error).splitlines()[0]}") from None
            for target, tensors in made.items():
                converted[target] = tensors[0] if isinstance(tensors, list) else tensors
    return converted


def tied_names(model: nn.Module) -> dict[str, list[str]]:
    """Each tensor's name to all that a model has for it, where they are several."""
    groups: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        groups.setdefault(id(tensor), []).append(name)
    return {name: names for names in groups.values() if len(names) > 1 for name in names}


def _stored_tensors(folder: Path, source: str) -> dict[str, StoredTensor]:
    """What lies in a folder's safetensors files, by its name there; those files that `from_pretrained` reads."""
    try:
        if (folder / _FILE).exists():
            files = [_FILE]
        elif (folder / _INDEX).exists():
            files = sorted(set(json.loads((folder / _INDEX).read_text())["weight_map"].values()))
        else:
            raise UserError(f"{source} has no {_FILE}; save it with save_pretrained first.")
        tensors = {}
        for file in files:
            opened = safe_open(folder / file, framework="pt", device="cpu")
            for key in opened.keys():  # noqa: SIM118
                tensors[key] = _stored_tensor(opened, key)
        return tensors
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(f"{source} cannot be read: {str(error).splitlines()[0]}; save it once more.") from None


def _stored_tensor(opened: Any, key: str) -> StoredTensor:
    source = opened.get_slice(key)
    # An empty box has the tensor's type, and reads nothing else of it.
    shape = source.get_shape()
    dtype = source[(slice(0, 0),) * len(shape)].dtype if shape else opened.get_tensor(key).dtype

    def read(box: Box) -> torch.Tensor:
        values: torch.Tensor = source[box.slices] if shape else opened.get_tensor(key)
        return values

    return StoredTensor(shape, dtype, read)


def find_folder(name: str, setting: str = "model.pretrained") -> Path:
    """The folder of a pretrained model that is named by it, or by its name on the hub.

    Raises:
        UserError: there is none.
    """
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.json"]))
    except (OSError, ValueError) as error:
        raise UserError(f"{setting}={name} is neither a folder nor to be had: {str(error).splitlines()[0]}") from None
