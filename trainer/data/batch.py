"""A batch on its way to the device."""

import torch

from sharding.engine import Batch


def pinned(batch: Batch) -> Batch:
    """A batch of the host in page-locked memory where there is a GPU, so that copying does not make the host wait."""
    if not torch.cuda.is_available():
        return batch
    return {name: tensor.contiguous().pin_memory() for name, tensor in batch.items()}
