"""Pretrained weights, read by each rank as the slices that it holds."""

from pathlib import Path
from typing import Any

from safetensors import safe_open

from sharding.engine import Engine
from sharding.errors import UserError
from sharding.state import TensorSlice


def load_pretrained(engine: Engine, name: str) -> None:
    """Fill an engine's parameters from a `transformers` model's safetensors files.

    Args:
        engine: the engine; only this rank's slices are read.
        name: a folder, or the name of a model of the hub.

    Raises:
        UserError: there are no safetensors files, or they lack a parameter or have it in another shape.
    """
    weights = _PretrainedWeights(_find_folder(name), name)
    engine.load_state(weights.read_into, with_optimizer=False)


class _PretrainedWeights:
    def __init__(self, folder: Path, name: str) -> None:
        self._name = name
        self._files: dict[str, Any] = {}
        for path in sorted(folder.glob("*.safetensors")):
            opened = safe_open(path, framework="pt", device="cpu")
            self._files |= dict.fromkeys(opened.keys(), opened)
        if not self._files:
            raise UserError(f"model.pretrained={name} has no .safetensors files; save it with save_pretrained first.")

    def read_into(self, part: TensorSlice) -> None:
        wanted = part.name.removeprefix("model/")
        key = self._find_key(wanted)
        source = self._files[key].get_slice(key)
        shape = tuple(source.get_shape())
        if shape != part.global_shape:
            raise UserError(
                f"model.pretrained={self._name} has {key} in shape {list(shape)}, but its configuration makes it "
                f"{list(part.global_shape)}; the folder is not of one model."
            )
        if part.tensor.numel():
            index = tuple(slice(o, o + n) for o, n in zip(part.offsets, part.tensor.shape, strict=True))
            part.tensor.copy_(source[index] if index else self._files[key].get_tensor(key))

    def _find_key(self, wanted: str) -> str:
        """Files of a bare base model leave out the prefix under which a task's model holds it."""
        candidates = [wanted, wanted.partition(".")[2]]
        for candidate in candidates:
            if candidate in self._files:
                return candidate
        raise UserError(
            f"model.pretrained={self._name} has no weights for {wanted}; it was saved by another model class."
        )


def _find_folder(name: str) -> Path:
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.json"]))
    except (OSError, ValueError) as error:
        raise UserError(
            f"model.pretrained={name} is neither a folder nor to be had: {str(error).splitlines()[0]}"
        ) from None
