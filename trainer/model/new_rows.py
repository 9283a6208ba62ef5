"""Rows of tokens that a pretrained model does not know: each begins as the mean of those that are there."""

import numpy as np
import torch
from torch import nn

from sharding.part import Box
from trainer.model.models import output_embeddings
from trainer.model.stored_tensor import StoredTensor

_CHUNK_ROWS = 4096


def with_new_rows(model: nn.Module, tensors: dict[str, StoredTensor]) -> tuple[dict[str, StoredTensor], str]:
    """Stored tensors with as many rows as a model has that was built for a larger vocabulary.

    The mean of embeddings lies among them, where a draw of its own may lie far from all: the model neither prefers a
    new token nor is upset by it.

    Args:
        model: the model, before it is sharded.
        tensors: what is stored, under the names of the model's tensors.

    Returns:
        The same, of which embeddings, output projection and its bias have rows more; and that in one line, empty where
        the model had room.
    """
    inputs, outputs = getattr(model, "get_input_embeddings", lambda: None)(), output_embeddings(model)
    of_tokens = {id(p) for module in (inputs, outputs) if module is not None for p in module.parameters(recurse=False)}
    longer, note = {}, ""
    for name, tensor in model.state_dict(keep_vars=True).items():
        stored = tensors.get(name)
        if id(tensor) not in of_tokens or stored is None or tuple(stored.shape[1:]) != tuple(tensor.shape[1:]):
            continue
        num_new = len(tensor) - len(stored)
        if num_new > 0:
            longer[name] = _longer(stored, len(tensor))
            note = f"vocabulary: {num_new} tokens added to {len(stored)}, whose mean is each one's embedding"
    return tensors | longer, note


def _longer(stored: StoredTensor, num_rows: int) -> StoredTensor:
    num_stored = len(stored)
    mean: list[torch.Tensor] = []

    def read(box: Box) -> torch.Tensor:
        first, last = box.offsets[0], box.offsets[0] + box.shape[0]
        parts = []
        if first < num_stored:
            parts.append(stored.read(box.along(0, first, min(last, num_stored) - first)).float())
        if last > num_stored:
            if not mean:
                mean.append(_mean_of_rows(stored))
            new = mean[0][box.slices[1:]]
            parts.append(new.expand(last - max(first, num_stored), *new.shape))
        return torch.cat(parts)

    return StoredTensor((num_rows, *stored.shape[1:]), stored.dtype, read)


def _mean_of_rows(stored: StoredTensor) -> torch.Tensor:
    """The mean in fp64, rounded to fp32; of whole rows whoever asks for a part, so that all ranks get the same bits."""
    whole = Box((0,) * stored.ndim, tuple(stored.shape))
    total = np.zeros(tuple(stored.shape[1:]))
    for first in range(0, len(stored), _CHUNK_ROWS):
        rows = stored.read(whole.along(0, first, min(_CHUNK_ROWS, len(stored) - first)))
        # Not by torch, whose order of additions depends on the number of threads.
        total += rows.float().contiguous().numpy().sum(axis=0, dtype=np.float64)
    return torch.from_numpy(np.asarray(total / len(stored), dtype=np.float32))
