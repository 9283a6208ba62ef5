"""Weights with many zeros as a bit for each, and the values that are not zero, where that is smaller."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sharding.ranks.errors import UserError

SPARSE_ENDING = ".sparse.safetensors"
SPARSE_NOTE = f"""
## Weights that are zero

They are not stored: files `*{SPARSE_ENDING}` have a bit for each weight, and those that are not zero. To have
`model.safetensors`, which `from_pretrained` loads:

    from safetensors.torch import save_file
    from trainer.deploy.sparse_folder import load_sparse

    save_file(load_sparse("."), "model.safetensors", {{"format": "pt"}})
"""
"""What the card of such a folder says of it."""

_DENSE_ENDING = ".safetensors"
_MASK, _VALUES = ".mask", ".values"
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def load_sparse(folder: str | Path) -> dict[str, torch.Tensor]:
    """The weights of a folder that was exported with ``--sparse``, whole, by name.

    A tensor NAME whose shape is in the file's metadata ``shapes`` is stored as ``NAME.mask``, uint8, a bit for each
    element in row-major order, from the lowest bit on, and ``NAME.values``, the elements whose bit is 1, in order. Any
    other is stored as it is.
    """
    weights: dict[str, torch.Tensor] = {}
    for path in sorted(Path(folder).glob(f"*{SPARSE_ENDING}")):
        with safe_open(path, "pt") as file:
            shapes: Mapping[str, list[int]] = json.loads(file.metadata()["shapes"])
            packed = {f"{name}{ending}" for name in shapes for ending in (_MASK, _VALUES)}
            weights |= {name: file.get_tensor(name) for name in file.keys() if name not in packed}  # noqa: SIM118
            for name, shape in shapes.items():
                weights[name] = _unpack(file.get_tensor(f"{name}{_MASK}"), file.get_tensor(f"{name}{_VALUES}"), shape)
    return weights


def make_sparse(folder: Path) -> None:
    """Replace the weights of an exported folder by their sparse form, from which they can be had again bit for bit.

    Args:
        folder: has ``model.safetensors``, or several files of weights and their index.

    Raises:
        UserError: no tensor has so many zeros that it would be smaller.
    """
    dense = sorted(folder.glob(f"*{_DENSE_ENDING}"))
    renamed: dict[str, str] = {}
    num_packed = 0
    for path in dense:
        weights = load_file(path)
        stored, shapes = _pack(weights)
        num_packed += len(shapes)
        target = path.with_name(path.name.removesuffix(_DENSE_ENDING) + SPARSE_ENDING)
        save_file(stored, target, {"format": "pt", "shapes": json.dumps(shapes)})
        renamed[path.name] = target.name
        path.unlink()
    if not num_packed:
        raise UserError(
            "--sparse stores a bit for each weight and those that are not zero, but no weight of this model has so "
            "many zeros that this would be smaller; leave it out, or prune the run (shardline prune)."
        )
    index = folder / "model.safetensors.index.json"
    if index.exists():
        values = json.loads(index.read_text())
        values["weight_map"] = {name: renamed[file] for name, file in values["weight_map"].items()}
        index.with_name("model.sparse.safetensors.index.json").write_text(json.dumps(values, indent=2) + "\n")
        index.unlink()


def _pack(weights: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, list[int]]]:
    """What is stored of weights, and the shapes of those that are packed."""
    stored: dict[str, torch.Tensor] = {}
    shapes: dict[str, list[int]] = {}
    for name, tensor in weights.items():
        flat = tensor.contiguous().reshape(-1)
        # Of its bits, since a negative zero is one too, and not the same.
        mask = flat.view(_INTEGERS[flat.element_size()]) != 0
        values, bits = flat[mask], torch.from_numpy(np.packbits(mask.numpy(), bitorder="little"))
        if values.numel() * values.element_size() + bits.numel() < flat.numel() * flat.element_size():
            stored |= {f"{name}{_MASK}": bits, f"{name}{_VALUES}": values}
            shapes[name] = list(tensor.shape)
            if not torch.equal(
                _unpack(bits, values, shapes[name]).reshape(-1).view(torch.uint8), flat.view(torch.uint8)
            ):
                raise RuntimeError(f"{name} is another tensor once it is unpacked")
        else:
            stored[name] = tensor
    return stored, shapes


def _unpack(bits: torch.Tensor, values: torch.Tensor, shape: list[int]) -> torch.Tensor:
    mask = np.unpackbits(bits.numpy(), count=math.prod(shape), bitorder="little")
    whole = torch.zeros(math.prod(shape), dtype=values.dtype)
    whole[torch.from_numpy(mask).bool()] = values
    return whole.view(shape)
