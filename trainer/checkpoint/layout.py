"""What a manifest says of files and tensors, held against itself, against file sizes and against safetensors headers.

Imports no torch, so that the launcher may look before it starts ranks.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

from trainer.checkpoint.manifest import CorruptCheckpoint, FileEntry, SliceEntry, TensorEntry, unreadable
from trainer.files.storage import CheckpointPath, file_sizes

# torch's names of the element types that a checkpoint may hold, as a safetensors header has them.
HEADER_DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}


def check_sizes(folder: CheckpointPath, files: Mapping[str, FileEntry]) -> None:
    """Compare the sizes of all files with the manifest.

    Raises:
        CorruptCheckpoint: a file is missing, has another size, or a name that leads out of the checkpoint's folder.
        StorageOutage: they cannot be looked at for now.
    """
    try:
        sizes = file_sizes(folder)
    except OSError as error:
        raise unreadable(folder, "its folder", error) from None
    for name, entry in files.items():
        if name in ("", ".", "..") or "/" in name or "\0" in name:
            raise CorruptCheckpoint(folder, f"the manifest lists {name!r}, which is not a name of a file in it")
        num_bytes = sizes.get(name)
        if num_bytes is None:
            raise CorruptCheckpoint(folder, f"{name} cannot be found")
        if num_bytes != entry.num_bytes:
            raise CorruptCheckpoint(folder, f"{name} has {num_bytes} bytes instead of {entry.num_bytes}")


def check_parts(
    folder: CheckpointPath, tensors: Mapping[str, TensorEntry], files: Mapping[str, FileEntry], tokenizer: str | None
) -> None:
    """Check that no stored part, nor the tokenizer, is in a file of which the manifest does not speak.

    Raises:
        CorruptCheckpoint: a file is not listed.
    """
    named = {part.file for entry in tensors.values() for part in entry.slices}
    if tokenizer is not None:
        named.add(tokenizer)
    if unlisted := sorted(named - files.keys()):
        raise CorruptCheckpoint(
            folder, f"the manifest does not list {unlisted[0]}, in which it says that tensors or the tokenizer are"
        )


def check_tensors(folder: CheckpointPath, tensors: Mapping[str, TensorEntry], names: Sequence[str]) -> None:
    """Check that the stored parts of tensors cover each of them exactly once.

    Raises:
        CorruptCheckpoint: there is a gap or an overlap, or the type of elements is unknown.
    """
    for name in names:
        entry = tensors[name]
        if entry.dtype not in HEADER_DTYPES:
            raise CorruptCheckpoint(folder, f"{name} has elements of an unknown type {entry.dtype!r}")
        fault = _tiling_fault(entry.shape, entry.slices)
        if fault is not None:
            raise CorruptCheckpoint(folder, f"{name}: {fault}")


def parts_by_file(
    tensors: Mapping[str, TensorEntry], files: Iterable[str]
) -> dict[str, list[tuple[TensorEntry, SliceEntry]]]:
    """The stored parts of tensors, with the tensor that each is of, by file."""
    parts: dict[str, list[tuple[TensorEntry, SliceEntry]]] = {name: [] for name in files}
    for entry in tensors.values():
        for part in entry.slices:
            parts[part.file].append((entry, part))
    return parts


def check_header(
    folder: CheckpointPath,
    file: str,
    parts: list[tuple[TensorEntry, SliceEntry]],
    found: Mapping[str, tuple[str, list[int]]],
) -> None:
    """Check that a safetensors file holds just the parts that the manifest says are in it.

    Args:
        folder: the checkpoint.
        file: name of the file.
        parts: what is in it by the manifest.
        found: type, as a header has it, and shape of what is in it by its own header.

    Raises:
        CorruptCheckpoint: a key is missing, not listed or listed twice, or has another type or shape.
    """
    wanted = {part.key: (HEADER_DTYPES.get(entry.dtype), part.shape) for entry, part in parts}
    if len(wanted) < len(parts):
        raise CorruptCheckpoint(folder, f"the manifest has one part of {file} twice")
    if found != wanted:
        differing = next(key for key in [*wanted, *found] if wanted.get(key) != found.get(key))
        raise CorruptCheckpoint(
            folder,
            f"{file} has {differing} as {_describe(found.get(differing))}, and the manifest says "
            f"{_describe(wanted.get(differing))}",
        )


def _describe(entry: tuple[str | None, list[int]] | None) -> str:
    return "nothing" if entry is None else f"{entry[0]} {entry[1]}"


def _tiling_fault(shape: list[int], parts: list[SliceEntry]) -> str | None:
    """What keeps boxes from covering a whole exactly once; None where they do."""
    num_elements = 0
    for part in parts:
        if not len(part.offsets) == len(part.shape) == len(shape) or not all(
            offset >= 0 and size >= 0 and offset + size <= whole
            for offset, size, whole in zip(part.offsets, part.shape, shape, strict=True)
        ):
            return f"a part at {part.offsets} of shape {part.shape} is not inside {shape}"
        num_elements += math.prod(part.shape)
    if num_elements != math.prod(shape):
        return f"its parts have {num_elements} elements, and {shape} has {math.prod(shape)}"
    # Inside the whole and together as large, boxes that do not overlap leave no gap.
    return _overlap([part for part in parts if math.prod(part.shape)])


def _overlap(parts: list[SliceEntry]) -> str | None:
    """Sweep along dim 0: a box is compared only with those that have not ended before it begins."""
    if parts and not parts[0].shape:
        return "it has several parts" if len(parts) > 1 else None
    open_parts: list[SliceEntry] = []
    for part in sorted(parts, key=lambda part: part.offsets):
        open_parts = [other for other in open_parts if other.offsets[0] + other.shape[0] > part.offsets[0]]
        for other in open_parts:
            if all(
                max(a, b) < min(a + size_a, b + size_b)
                for a, size_a, b, size_b in zip(part.offsets, part.shape, other.offsets, other.shape, strict=True)
            ):
                return f"its parts at {other.offsets} and {part.offsets} overlap"
        open_parts.append(part)
    return None
