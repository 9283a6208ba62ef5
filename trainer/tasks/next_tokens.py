"""From packed tokens to inputs and the token that follows each."""

import torch

from sharding.engine import Batch
from trainer.data.samples import FILLER

IGNORED_LABEL = -100
"""Label of a position without a target, as `transformers` and ``cross_entropy`` have it."""


def next_token_batch(samples: Batch, positions: torch.Tensor | None = None) -> Batch:
    """Shift packed tokens by one.

    Args:
        samples: as ``trainer.data.packed.packed_rows`` gives them.
        positions: of the samples, int64 [micro]; one that only fills up has no target.

    Returns:
        ``input_ids`` and ``labels``, int64 [micro, length]; a label is the token that follows, or -100 beyond the end
        of the stream. Where the samples say where documents start, these are kept apart: ``position_ids`` of the same
        form count from each document's start, which is also how a model tells documents apart in attention, and the
        first token of a document is nobody's target, as it would be were the document trained alone. Where they say
        which tokens are targets, of conversations what the assistant says, no other token is one.
    """
    tokens, num_tokens = samples["tokens"], samples["num_tokens"]
    columns = torch.arange(tokens.shape[1] - 1)
    # A copy: masking labels in place must not reach the inputs.
    batch = {"input_ids": tokens[:, :-1], "labels": tokens[:, 1:].clone()}
    if "document_starts" in samples:
        is_start = samples["document_starts"]
        starts = torch.where(is_start[:, :-1], columns, 0).cummax(dim=1).values
        batch["position_ids"] = columns - starts
        batch["labels"][is_start[:, 1:]] = IGNORED_LABEL
    if "is_target" in samples:
        batch["labels"][~samples["is_target"][:, 1:]] = IGNORED_LABEL
    has_target = columns + 1 < num_tokens[:, None]
    if positions is not None:
        has_target &= (positions != FILLER)[:, None]
    batch["labels"][~has_target] = IGNORED_LABEL
    return batch
