"""A copy of a rank's state on the host, from which it is written while training goes on."""

from dataclasses import replace

import torch

from sharding.part import Part

# Holds for every type of element.
_ALIGNMENT_BYTES = 64


class Snapshot:
    """One buffer on the host that each save copies into, page-locked where the state is on a GPU."""

    def __init__(self) -> None:
        """Nothing is allocated before the first save."""
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def take(self, parts: list[Part]) -> list[Part]:
        """Copy the parts that this rank writes; what was taken before is overwritten.

        Returns:
            Those parts, their tensors on the host. They share no memory with the state.
        """
        written = [part for part in parts if part.is_written_here]
        starts, end = [], 0
        for part in written:
            starts.append(end)
            end += -(-part.num_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        on_gpu = any(part.tensor.is_cuda for part in written)
        if self._buffer.numel() < end:
            # The old one goes first: there is no room for both, perhaps.
            self._buffer = torch.empty(0, dtype=torch.uint8)
            self._buffer = torch.empty(end, dtype=torch.uint8, pin_memory=on_gpu)
        copies = []
        for part, start in zip(written, starts, strict=True):
            place = self._buffer[start : start + part.num_bytes].view(part.tensor.dtype).view(part.tensor.shape)
            place.copy_(part.tensor, non_blocking=True)
            copies.append(replace(part, tensor=place))
        if on_gpu:
            # Once for all copies, and before the next step changes what they are of.
            torch.cuda.current_stream().synchronize()
        return copies
