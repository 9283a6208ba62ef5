"""Tensors in the safetensors files of one folder, as its manifest describes them: read and verified."""

from collections.abc import Collection, Mapping

import torch

from sharding.part import Box, Part
from trainer.checkpoint.base_manifest import blaming_base, read_base
from trainer.checkpoint.layout import check_header, check_parts, check_sizes, check_tensors, parts_by_file
from trainer.checkpoint.manifest import CorruptCheckpoint, FileEntry, SliceEntry, TensorEntry, hash_file, unreadable
from trainer.checkpoint.tensor_file import TensorFile
from trainer.files.storage import CheckpointPath

# Each has a buffer of its own, where it lies in an object store.
_MAX_OPEN_FILES = 8


class StoredFiles:
    """One folder, of whose files just what is asked for is read."""

    def __init__(
        self, folder: CheckpointPath, tensors: Mapping[str, TensorEntry], files: Mapping[str, FileEntry]
    ) -> None:
        """Bind to what a manifest says of a folder.

        Raises:
            CorruptCheckpoint: a file is missing or has another size than it says.
            StorageOutage: they cannot be looked at for now.
        """
        self.folder = folder
        self.tensors = tensors
        self.files = files
        # The one that was used last is the last.
        self._open_files: dict[str, TensorFile] = {}
        check_sizes(folder, files)

    def verify(self, index: int, num_shares: int, others: Collection[str] = ()) -> None:
        """Compare one share of several with the manifest: layout, headers and SHA-256.

        Args:
            index: which share, from 0.
            num_shares: how many there are.
            others: files that hold no tensors.

        Raises:
            CorruptCheckpoint: something is not as the manifest says, or the manifest contradicts itself.
        """
        check_tensors(self.folder, self.tensors, sorted(self.tensors)[index::num_shares])
        parts = parts_by_file(self.tensors, self.files)
        for name in sorted(self.files)[index::num_shares]:
            if self._hash(name) != self.files[name].sha256:
                raise CorruptCheckpoint(
                    self.folder, f"the contents of {name} do not have the SHA-256 that the manifest says"
                )
            if name not in others:
                check_header(self.folder, name, parts[name], self.file(name).header)

    def read_into(self, part: Part, entry: TensorEntry) -> None:
        """Fill a part of a tensor, whose shape is checked, from whatever slices are stored.

        Raises:
            CorruptCheckpoint: some of its elements are not there.
        """
        num_filled = 0
        for box, piece in part.pieces():
            for stored in entry.slices:
                num_filled += self._copy_overlap(box, piece, stored)
        if num_filled != part.tensor.numel():
            raise CorruptCheckpoint(
                self.folder, f"{part.name} has {num_filled} of {part.tensor.numel()} elements of a part"
            )

    def file(self, name: str) -> TensorFile:
        """One of the files, opened if it is not.

        Raises:
            CorruptCheckpoint: it is no safetensors file, or cannot be read.
        """
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
        file = self.file(stored.file)
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


def open_base(folder: CheckpointPath) -> StoredFiles:
    """The frozen parameters in a folder.

    Raises:
        CorruptBase: there are none, or a file is missing or has another size than their manifest says.
        UserError: they are of another version.
        StorageOutage: they cannot be looked at for now.
    """
    manifest = read_base(folder)
    with blaming_base(folder):
        return StoredFiles(folder, manifest.tensors, manifest.files)


def verify_base(base: StoredFiles, index: int = 0, num_shares: int = 1) -> None:
    """As ``StoredFiles.verify``, of a base.

    Raises:
        CorruptBase: something is not as its manifest says, or the manifest contradicts itself.
    """
    with blaming_base(base.folder):
        check_parts(base.folder, base.tensors, base.files, None)
        base.verify(index, num_shares)
