"""A micro-batch of packed tokens."""

import numpy as np
import torch

from sharding.engine import Batch

IGNORED_LABEL = -100


def packed_batch(tokens: np.ndarray, is_start: np.ndarray | None) -> Batch:
    """A micro-batch from rows of packed tokens.

    Args:
        tokens: int64 [rows, length + 1].
        is_start: bool, of the same shape: where documents start. Given, documents are kept apart: positions count from
            each document's start, which is also how a model tells documents in attention apart, and the first token of
            a document is nobody's target, as it would be were the document trained alone.

    Returns:
        ``input_ids`` and ``labels``, int64 [rows, length]; a label is the token that follows, or -100. With
        ``is_start`` also ``position_ids`` of the same form.
    """
    whole = torch.from_numpy(tokens)
    # A copy: masking labels in place must not reach the inputs.
    batch = {"input_ids": whole[:, :-1], "labels": whole[:, 1:].clone()}
    if is_start is not None:
        columns = np.arange(tokens.shape[1] - 1)
        starts = np.maximum.accumulate(np.where(is_start[:, :-1], columns, 0), axis=1)
        batch["position_ids"] = torch.from_numpy(columns - starts)
        batch["labels"][torch.from_numpy(is_start[:, 1:])] = IGNORED_LABEL
    if torch.cuda.is_available():
        # From pinned memory the copy to the device does not make the host wait.
        batch = {name: tensor.contiguous().pin_memory() for name, tensor in batch.items()}
    return batch
