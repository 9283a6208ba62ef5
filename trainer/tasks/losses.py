"""Summed losses of classification and regression, in fp32."""

import torch
from torch.nn import functional

from trainer.tasks.next_tokens import IGNORED_LABEL


def cross_entropy_sum(
    logits: torch.Tensor,
    targets: torch.Tensor,
    class_weights: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Cross-entropy in nats, summed over targets.

    Args:
        logits: [..., classes].
        targets: class indices, int64 [...], -100 where there is no target; or probabilities of classes, one-hot or
            soft, [..., classes], all 0 where there is no target.
        class_weights: factor of each class's share of the loss, [classes].
        label_smoothing: share of each target that is spread over all classes.
    """
    logits = logits.float().reshape(-1, logits.shape[-1])
    if not targets.is_floating_point():
        return functional.cross_entropy(
            logits, targets.flatten(), class_weights, reduction="sum", ignore_index=IGNORED_LABEL,
            label_smoothing=label_smoothing,
        )  # fmt: skip
    targets = targets.float().reshape(logits.shape)
    losses = functional.cross_entropy(logits, targets, class_weights, reduction="none", label_smoothing=label_smoothing)
    # Smoothing would give a target to samples without one.
    return torch.where(has_target(targets), losses, 0.0).sum()


def binary_cross_entropy_sum(
    logits: torch.Tensor,
    targets: torch.Tensor,
    class_weights: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Binary cross-entropy in nats, summed over targets.

    Args:
        logits: log odds of the second of two classes, [samples, 1].
        targets: as in ``cross_entropy_sum``.
        class_weights: as there, [2].
        label_smoothing: as there.
    """
    # The same function, computed on the difference of two logits.
    both = torch.cat([torch.zeros_like(logits), logits], dim=-1)
    return cross_entropy_sum(both, targets, class_weights, label_smoothing)


def squared_error_sum(predictions: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Squared errors, summed; all [samples], a weight of 0 where there is no target."""
    return _weighted_sum((predictions.float() - _finite(targets, weights)).square(), weights)


def huber_sum(predictions: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, delta: float) -> torch.Tensor:
    """Huber's loss, summed: half the squared error up to ``delta``, and linear beyond; see ``squared_error_sum``."""
    losses = functional.huber_loss(predictions.float(), _finite(targets, weights), reduction="none", delta=delta)
    return _weighted_sum(losses, weights)


def has_target(targets: torch.Tensor) -> torch.Tensor:
    """Whether there is a target, bool [...], by targets as ``cross_entropy_sum`` takes them."""
    return targets.sum(dim=-1) > 0 if targets.is_floating_point() else targets != IGNORED_LABEL


def _finite(targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Targets in fp32, 0 where there is none, for a NaN would reach the gradient even where it has no weight."""
    return torch.where(weights > 0, targets, 0.0).float()


def _weighted_sum(losses: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return torch.where(weights > 0, losses, 0.0).sum()
