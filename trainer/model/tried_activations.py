"""What a forward pass keeps for backward, of any model: it is run on the meta device, where it costs nothing."""

import inspect

import torch
from torch import nn

from sharding.engine import Batch
from trainer.data.facts import SampleFacts


def tried_activation_bytes(model: nn.Module, facts: SampleFacts, num_rows: int) -> float:
    """Bytes that a pass over so many samples keeps in fp32, apart from parameters and what the samples are.

    Args:
        model: on the meta device.
        facts: of the samples.
        num_rows: in a micro-batch.

    Returns:
        0 where the model cannot be run so: it looks at values, or at columns that do not follow from the facts.
    """
    with torch.device("meta"):
        columns = columns_without_values(facts, num_rows)
    taken = inspect.signature(model.forward).parameters
    if "attention_mask" in taken and taken["attention_mask"].default is not inspect.Parameter.empty:
        # Models of transformers look into it, where there is nothing to be seen.
        columns.pop("attention_mask", None)
    kept: dict[int, torch.Tensor] = {}
    known = {_storage(tensor) for tensor in (*model.parameters(), *model.buffers(), *columns.values())}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        # The tensor, not its size: the memory of one that is gone may be another's.
        kept.setdefault(_storage(tensor), tensor)
        return tensor

    try:
        with torch.device("meta"), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            outputs = model(**{name: column for name, column in columns.items() if name in taken})
    except Exception:  # noqa: BLE001 - each of many models fails in its own way, and this is only an estimate
        return 0.0
    del outputs
    return float(sum(tensor.untyped_storage().nbytes() for key, tensor in kept.items() if key not in known))


def _storage(tensor: torch.Tensor) -> int:
    key: int = tensor.untyped_storage()._cdata
    return key


def columns_without_values(facts: SampleFacts, num_rows: int) -> Batch:
    """What a task may give its model, on the device that is torch's default.

    Args:
        facts: of the samples.
        num_rows: how many of them.
    """
    columns: Batch = {}
    if facts.vocab_size is not None and facts.sequence_length is not None:
        columns["input_ids"] = torch.empty(num_rows, facts.sequence_length, dtype=torch.long)
        columns["attention_mask"] = torch.empty(num_rows, facts.sequence_length, dtype=torch.long)
    if facts.num_features:
        columns["features"] = torch.empty(num_rows, facts.num_features)
    if facts.categories:
        columns["categories"] = torch.empty(num_rows, len(facts.categories), dtype=torch.long)
    if facts.image_shape is not None:
        columns["pixel_values"] = torch.empty(num_rows, *facts.image_shape)
    if facts.num_audio_samples is not None:
        columns["input_values"] = torch.empty(num_rows, facts.num_audio_samples)
    return columns
