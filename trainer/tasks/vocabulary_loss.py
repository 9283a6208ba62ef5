"""Cross-entropy over a vocabulary, summed over targets, plain and compiled."""

import functools
from collections.abc import Callable

import torch
from torch.nn import functional

from trainer.runtime.compiled_by_shape import compiled_by_shape
from trainer.tasks.next_tokens import IGNORED_LABEL


def vocabulary_loss(logits: torch.Tensor, labels: torch.Tensor, z_loss: float = 0.0) -> torch.Tensor:
    """The summed loss in nats, an fp32 scalar, computed in fp32.

    With a coefficient it is cross-entropy plus z_loss x log^2 Z at each target, Z the softmax's denominator. Keeping
    it near 1 keeps logits from drifting, which low precision suffers from: Chowdhery et al., "PaLM" (2022), section 5.

    Args:
        logits: [micro, length, vocabulary].
        labels: int64 [micro, length], -100 where there is no target.
        z_loss: the coefficient.
    """
    logits, labels = logits.float().flatten(0, 1), labels.flatten()
    if not z_loss:
        return functional.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORED_LABEL)
    # The cross-entropy is log Z less the target's logit: one log Z serves both, in memory as well.
    log_z = logits.logsumexp(dim=-1)
    target_logits = logits.gather(-1, labels.clamp(min=0)[:, None])[:, 0]
    losses = log_z - target_logits + z_loss * log_z.square()
    return torch.where(labels == IGNORED_LABEL, 0.0, losses).sum()


@functools.cache
def compiled_vocabulary_loss(
    backend: str = "inductor",
) -> Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]:
    """``vocabulary_loss`` compiled by a backend of ``torch.compile``, for each shape by itself.

    Logits in 16 bits are so read as they are, twice forwards and once backwards, and no others are written.
    """
    return compiled_by_shape(vocabulary_loss, backend)
