"""Reading any part of a checkpoint, by any layout."""

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path

import torch

from sharding.part import Part, part_of
from sharding.ranks.errors import UserError
from sharding.state import AVERAGE_PREFIX, MODEL_PREFIX, is_projection
from trainer.checkpoint.base_manifest import base_folder, blaming_base
from trainer.checkpoint.layout import check_parts
from trainer.checkpoint.manifest import (
    CorruptCheckpoint,
    FileEntry,
    Manifest,
    TensorEntry,
    fingerprint,
    read_manifest,
    unreadable,
)
from trainer.checkpoint.reference import checkpoints_of
from trainer.checkpoint.stored_files import StoredFiles, open_base, verify_base
from trainer.checkpoint.tokenizer_archive import unpack_tokenizer
from trainer.data.rows_manifest import RowRecipe
from trainer.files.storage import CheckpointPath, is_url
from trainer.run_folder.folder import RunFolder
from trainer.run_folder.listing import checkpoint_folder, list_checkpoints


class CheckpointReader:
    """One checkpoint, of whose files just what is asked for is read."""

    def __init__(self, folder: CheckpointPath) -> None:
        """Open a checkpoint.

        Raises:
            UserError: there is none, or it is of another version.
            CorruptCheckpoint: the manifest is corrupt, or a file is missing or has another size than it says.
            CorruptBase: the same of the frozen parameters that it refers to.
        """
        self.folder = folder
        self.manifest: Manifest = read_manifest(folder)
        self._own = StoredFiles(folder, self.manifest.tensors, self.manifest.files)
        self._base = None if self.manifest.base is None else open_base(base_folder(folder, self.manifest.base))
        self.tensors: Mapping[str, TensorEntry] = self.manifest.tensors
        """All of the canonical state, wherever it lies: its own tensors, and those of its base."""
        if self._base is not None:
            self.tensors = {**self._base.tensors, **self.manifest.tensors}

    @property
    def files(self) -> dict[str, FileEntry]:
        """Every file of the checkpoint but its manifest, by name; those of its base too, by folder and name."""
        if self._base is None:
            return self.manifest.files
        return self.manifest.files | {f"{self.manifest.base}/{name}": entry for name, entry in self._base.files.items()}

    def verify(self, index: int = 0, num_shares: int = 1, *, with_base: bool = True) -> None:
        """Compare everything with the manifest, or one share of several of it: layout, headers and SHA-256.

        Args:
            index: which share, from 0.
            num_shares: how many there are; all of them together are the whole.
            with_base: whether the frozen parameters that lie beside it are compared too.

        Raises:
            CorruptCheckpoint: something is not as the manifest says, or the manifest contradicts itself.
            CorruptBase: the same of the frozen parameters.
        """
        manifest = self.manifest
        if fingerprint(manifest.config) != manifest.config_fingerprint:
            raise CorruptCheckpoint(self.folder, "the configuration does not have its fingerprint")
        tokenizer = None if manifest.tokenizer is None else manifest.tokenizer.file
        check_parts(self.folder, manifest.tensors, manifest.files, tokenizer)
        others = [name for name in (manifest.recipe_file, tokenizer) if name is not None]
        self._own.verify(index, num_shares, others)
        if self._base is not None and with_base:
            verify_base(self._base, index, num_shares)

    def unpack_tokenizer(self, folder: Path) -> bool:
        """Write the files of the run's tokenizer into a folder; false where the checkpoint, an old one, has none.

        Raises:
            CorruptCheckpoint: it is not as it was written.
        """
        entry = self.manifest.tokenizer
        if entry is None:
            return False
        unpack_tokenizer(self._attachment(entry.file), folder)
        return True

    def read_recipe(self) -> RowRecipe | None:
        """How rows become what the model reads; None where samples are packed tokens.

        Raises:
            CorruptCheckpoint: it is not as it was written.
        """
        name = self.manifest.recipe_file
        return None if name is None else RowRecipe.model_validate_json(self._attachment(name))

    def read_attachments(self) -> dict[str, bytes]:
        """Contents of the files that hold no tensors, by name: the tokenizer, and how rows are read.

        Raises:
            CorruptCheckpoint: one is not as it was written.
        """
        tokenizer = self.manifest.tokenizer
        names = (None if tokenizer is None else tokenizer.file, self.manifest.recipe_file)
        return {name: self._attachment(name) for name in names if name is not None}

    def _attachment(self, name: str) -> bytes:
        try:
            contents = (self.folder / name).read_bytes()
        except OSError as error:
            raise unreadable(self.folder, name, error) from None
        if hashlib.sha256(contents).hexdigest() != self.manifest.files[name].sha256:
            raise CorruptCheckpoint(
                self.folder, f"the contents of {name} do not have the SHA-256 that the manifest says"
            )
        return contents

    @property
    def has_average(self) -> bool:
        """Whether a moving average of the weights was saved."""
        return any(name.startswith(AVERAGE_PREFIX) for name in self.tensors)

    def parameter_names(self) -> list[str]:
        """Names of the model's tensors, as the model names them, without those that only training needs."""
        prefix = MODEL_PREFIX
        names = [name.removeprefix(prefix) for name in self.tensors if name.startswith(prefix)]
        return [name for name in names if not is_projection(name)]

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each of the model's tensors by its name."""
        return {name: tuple(self._entry(f"{MODEL_PREFIX}{name}").shape) for name in self.parameter_names()}

    def parameter_bytes(self, name: str) -> int:
        """Size of a tensor of the model."""
        entry = self._entry(f"{MODEL_PREFIX}{name}")
        return math.prod(entry.shape) * getattr(torch, entry.dtype).itemsize

    def read_parameter(self, name: str, *, averaged: bool = False) -> torch.Tensor:
        """A whole tensor of the model, fp32, on the CPU; ``averaged`` takes its moving average, if it has one."""
        full_name = f"{AVERAGE_PREFIX}{name}"
        if not averaged or full_name not in self.tensors:
            full_name = f"{MODEL_PREFIX}{name}"
        entry = self._entry(full_name)
        tensor = torch.empty(entry.shape, dtype=getattr(torch, entry.dtype))
        self.read_into(part_of(full_name, tensor))
        return tensor

    def read_into(self, part: Part) -> None:
        """Fill a part of the canonical state from whatever slices are stored.

        Raises:
            UserError: the checkpoint has no such tensor, or one of another shape.
        """
        entry = self._entry(part.name)
        if tuple(entry.shape) != part.global_shape:
            raise UserError(
                f"checkpoint {self.folder} is of another model: {part.name} has shape {entry.shape} there and "
                f"{list(part.global_shape)} here; continue with the model it was saved from."
            )
        if self._base is not None and part.name not in self.manifest.tensors:
            with blaming_base(self._base.folder):
                self._base.read_into(part, entry)
        else:
            self._own.read_into(part, entry)

    def _entry(self, name: str) -> TensorEntry:
        try:
            return self.tensors[name]
        except KeyError:
            raise UserError(
                f"checkpoint {self.folder} is of another model or optimizer: it has no {name}; "
                "continue with the settings it was saved under, or set checkpoint.load=weights."
            ) from None


def open_checkpoint(run: str, step: int | None) -> CheckpointReader:
    """A run's checkpoint, the newest where no step is given; the run may be the URL that its checkpoints lie under.

    Raises:
        UserError: there is no such run or checkpoint, or it is corrupt.
    """
    if not is_url(run):
        RunFolder(Path(run)).frozen_config()
    checkpoints = checkpoints_of("RUN", run)
    if step is not None:
        return CheckpointReader(checkpoint_folder(checkpoints, step))
    found = list_checkpoints(checkpoints)
    if not found:
        raise UserError(f"{run} has no checkpoint yet; train it first.")
    return CheckpointReader(found[-1][1])
