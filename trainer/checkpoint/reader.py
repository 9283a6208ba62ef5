"""Reading any part of a checkpoint, by any layout."""

import hashlib
import math
from pathlib import Path

import torch

from sharding.part import Box, Part, part_of
from sharding.ranks.errors import UserError
from sharding.state import AVERAGE_PREFIX, MODEL_PREFIX
from trainer.checkpoint.layout import check_header, check_parts, check_sizes, check_tensors, parts_by_file
from trainer.checkpoint.manifest import (
    CorruptCheckpoint,
    Manifest,
    SliceEntry,
    TensorEntry,
    fingerprint,
    hash_file,
    read_manifest,
    unreadable,
)
from trainer.checkpoint.reference import checkpoints_of
from trainer.checkpoint.tensor_file import TensorFile
from trainer.checkpoint.tokenizer_archive import unpack_tokenizer
from trainer.data.rows_manifest import RowRecipe
from trainer.files.storage import CheckpointPath, is_url
from trainer.run_folder.folder import RunFolder
from trainer.run_folder.listing import checkpoint_folder, list_checkpoints

# Each has a buffer of its own, where it lies in an object store.
_MAX_OPEN_FILES = 8


class CheckpointReader:
    """One checkpoint, of whose files just what is asked for is read."""

    def __init__(self, folder: CheckpointPath) -> None:
        """Open a checkpoint.

        Raises:
            UserError: there is none, or it is of another version.
            CorruptCheckpoint: the manifest is corrupt, or a file is missing or has another size than it says.
        """
        self.folder = folder
        self.manifest: Manifest = read_manifest(folder)
        # The one that was used last is the last.
        self._open_files: dict[str, TensorFile] = {}
        check_sizes(folder, self.manifest)

    def verify(self, index: int = 0, num_shares: int = 1) -> None:
        """Compare everything with the manifest, or one share of several of it: layout, headers and SHA-256.

        Args:
            index: which share, from 0.
            num_shares: how many there are; all of them together are the whole.

        Raises:
            CorruptCheckpoint: something is not as the manifest says, or the manifest contradicts itself.
        """
        manifest = self.manifest
        if fingerprint(manifest.config) != manifest.config_fingerprint:
            raise CorruptCheckpoint(self.folder, "the configuration does not have its fingerprint")
        check_parts(self.folder, manifest)
        check_tensors(self.folder, manifest, sorted(manifest.tensors)[index::num_shares])
        parts = parts_by_file(manifest)
        for name in sorted(manifest.files)[index::num_shares]:
            if self._hash(name) != manifest.files[name].sha256:
                raise CorruptCheckpoint(
                    self.folder, f"the contents of {name} do not have the SHA-256 that the manifest says"
                )
            if name in (manifest.recipe_file, manifest.tokenizer and manifest.tokenizer.file):
                continue
            check_header(self.folder, name, parts[name], self._file(name).header)

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
        return any(name.startswith(AVERAGE_PREFIX) for name in self.manifest.tensors)

    def parameter_names(self) -> list[str]:
        """Names of the model's tensors, as the model names them."""
        prefix = MODEL_PREFIX
        return [name.removeprefix(prefix) for name in self.manifest.tensors if name.startswith(prefix)]

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
        if not averaged or full_name not in self.manifest.tensors:
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
        num_filled = 0
        for box, piece in part.pieces():
            for stored in entry.slices:
                num_filled += self._copy_overlap(box, piece, stored)
        if num_filled != part.tensor.numel():
            raise CorruptCheckpoint(
                self.folder, f"{part.name} has {num_filled} of {part.tensor.numel()} elements of a part"
            )

    def _entry(self, name: str) -> TensorEntry:
        try:
            return self.manifest.tensors[name]
        except KeyError:
            raise UserError(
                f"checkpoint {self.folder} is of another model or optimizer: it has no {name}; "
                "continue with the settings it was saved under, or set checkpoint.load=weights."
            ) from None

    def _copy_overlap(self, box: Box, piece: torch.Tensor, stored: SliceEntry) -> int:
        """Copy what a stored slice and a wanted box share; returns the number of elements."""
        source_index, target_index = [], []
        wanted = zip(box.offsets, box.shape, strict=True)
        for (want, want_size), have, have_size in zip(wanted, stored.offsets, stored.shape, strict=True):
            begin, end = max(want, have), min(want + want_size, have + have_size)
            if begin >= end:
                return 0
            source_index.append(slice(begin - have, end - have))
            target_index.append(slice(begin - want, end - want))
        file = self._file(stored.file)
        if file.header.get(stored.key, (None, None))[1] != stored.shape:
            raise CorruptCheckpoint(self.folder, f"{stored.file} has no {stored.key} of shape {stored.shape}")
        # Without dims there is nothing to index, and indexing a tensor by nothing makes no view of it.
        target = piece[tuple(target_index)] if target_index else piece
        try:
            file.read_into(stored.key, tuple(source_index), target)
        except ValueError as error:
            raise CorruptCheckpoint(self.folder, f"{stored.key} in {stored.file}: {error}") from None
        except OSError as error:
            raise unreadable(self.folder, stored.file, error) from None
        return target.numel()

    def _hash(self, name: str) -> str:
        try:
            return hash_file(self.folder / name)
        except OSError as error:
            raise unreadable(self.folder, name, error) from None

    def _file(self, name: str) -> TensorFile:
        file = self._open_files.pop(name, None)
        if file is None:
            while len(self._open_files) >= _MAX_OPEN_FILES:
                self._open_files.pop(next(iter(self._open_files))).close()
            try:
                file = TensorFile(self.folder / name)
            except ValueError as error:
                raise CorruptCheckpoint(self.folder, f"{name}: {error}") from None
            except OSError as error:
                raise unreadable(self.folder, name, error) from None
        self._open_files[name] = file
        return file


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
