"""Blocks of token files: hashed when a corpus is prepared, compared when a loader first reads them."""

import hashlib
from collections.abc import Callable, Sequence

import numpy as np

# What the kernel reads ahead in any case; 32 bytes of hash for it are 0.05 % of a corpus.
BLOCK_BYTES = 1 << 16
HASH_BYTES = hashlib.sha256().digest_size


def hash_blocks(contents: bytes | memoryview) -> bytes:
    """SHA-256 of each block of a file, one behind the other; the last block may be short."""
    view = memoryview(contents)
    starts = range(0, len(view), BLOCK_BYTES)
    return b"".join(hashlib.sha256(view[start : start + BLOCK_BYTES]).digest() for start in starts)


class BlockCheck:
    """Compares the blocks of mapped token files with their hashes, each block once.

    A block that was read is not compared again: what goes wrong between the page cache and a batch is not found here.
    """

    def __init__(
        self,
        read_hashes: Callable[[], bytes | memoryview],
        files: Sequence[np.ndarray],
        report: Callable[[int, int, int], None],
    ) -> None:
        """Nothing is read yet.

        Args:
            read_hashes: gives the hashes of all blocks of all files, in order; called once.
            files: the mapped files.
            report: is called with a file's number and the first and last byte (exclusive) of a block that has changed,
                and raises.
        """
        self._read_hashes = read_hashes
        self._hashes: bytes | memoryview = b""
        self._files = [file.view(np.uint8).data for file in files]
        self._report = report
        self._first_blocks = [0]
        for file in self._files:
            self._first_blocks.append(self._first_blocks[-1] + -(-len(file) // BLOCK_BYTES))
        self._is_compared = bytearray(self._first_blocks[-1])

    def compare(self, file: int, start: int, stop: int) -> None:
        """Compare the blocks that hold bytes [start, stop) of a file, unless they were compared before."""
        first = self._first_blocks[file]
        block, last = first + start // BLOCK_BYTES, first + (stop - 1) // BLOCK_BYTES
        while block <= last:
            if not self._is_compared[block]:
                self._compare_block(file, block, (block - first) * BLOCK_BYTES)
            block += 1

    def _compare_block(self, file: int, block: int, start: int) -> None:
        if not self._hashes:
            self._hashes = self._read_hashes()
        stop = min(start + BLOCK_BYTES, len(self._files[file]))
        digest = hashlib.sha256(self._files[file][start:stop]).digest()
        if digest != self._hashes[block * HASH_BYTES : (block + 1) * HASH_BYTES]:
            self._report(file, start, stop)
        self._is_compared[block] = 1
