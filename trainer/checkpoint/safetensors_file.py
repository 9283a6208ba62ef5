"""Writing a safetensors file piece by piece, hashed on the way, so that it is neither copied nor read once more."""

import hashlib
import json
from typing import BinaryIO

import torch

from trainer.checkpoint.layout import HEADER_DTYPES
from trainer.checkpoint.manifest import FileEntry
from trainer.files.storage import CheckpointPath, writing

# Large enough that a thread seldom asks for the interpreter's lock, which it does not hold while hashing and writing.
_CHUNK_BYTES = 8 * 2**20


def write_tensors(path: CheckpointPath, tensors: dict[str, torch.Tensor]) -> FileEntry:
    """Write tensors, and return once they are on the disk.

    The format is that of https://huggingface.co/docs/safetensors: the header's length in 8 bytes, the header in JSON,
    and the elements.

    Args:
        path: the file; it is overwritten.
        tensors: by key. Those on a device, or not contiguous, are copied to the host one at a time.

    Returns:
        Size and SHA-256.

    Raises:
        OSError: the file cannot be written.
    """
    # Larger types come first so that each tensor begins at a multiple of its element's size, and else the order stays
    # since who loads the same state goes through the file from front to back.
    ordered = sorted(tensors.items(), key=lambda item: -item[1].element_size())
    header, position = {}, 0
    for key, tensor in ordered:
        end = position + tensor.numel() * tensor.element_size()
        dtype = HEADER_DTYPES[str(tensor.dtype).removeprefix("torch.")]
        header[key] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with writing(path) as file:
        _write(file, memoryview(len(text).to_bytes(8, "little") + text), digest)
        for _, tensor in ordered:
            _write(file, _bytes_of(tensor), digest)
        num_bytes = file.tell()
    return FileEntry(num_bytes=num_bytes, sha256=digest.hexdigest())


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _write(file: BinaryIO, content: memoryview, digest: "hashlib._Hash") -> None:
    for begin in range(0, len(content), _CHUNK_BYTES):
        chunk = content[begin : begin + _CHUNK_BYTES]
        digest.update(chunk)
        # The system may take less than it is given, before it says that the disk is full.
        while chunk:
            chunk = chunk[file.write(chunk) :]
