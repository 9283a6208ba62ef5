"""Parameters that a run does not train: chosen by name, while the model has no memory yet."""

from collections.abc import Sequence

from torch import nn

from sharding.batch_norm import hold_statistics
from sharding.ranks.errors import UserError
from trainer.config.name_patterns import matching_names, without_match


def freeze_parameters(model: nn.Module, patterns: Sequence[str]) -> None:
    """Take the gradients from all parameters that a pattern of ``model.freeze`` matches, in place.

    A parameter that several modules share is frozen by any of its names. Batch normalisation all of whose parameters
    are frozen normalises by its running statistics in training too, and keeps them: what is frozen computes the same
    at every step.

    Raises:
        UserError: a pattern matches nothing.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for index, pattern in enumerate(patterns):
        names = matching_names(pattern, parameters)
        if not names:
            raise UserError(without_match(f"model.freeze.{index}", pattern, list(parameters)))
        for name in names:
            parameters[name].requires_grad_(False)
    if patterns:
        hold_statistics(model)


def check_trained(model: nn.Module, patterns: Sequence[str]) -> None:
    """Assert that something is left to train.

    Raises:
        UserError: no parameter is.
    """
    if any(parameter.requires_grad for parameter in model.parameters()):
        return
    num_parameters = sum(1 for _ in model.parameters())
    if not patterns:
        raise UserError(
            f"none of the {num_parameters} parameters of {type(model).__name__} has requires_grad=True, so nothing "
            "would be trained; let its code leave it to those that are to be."
        )
    raise UserError(
        f"model.freeze={list(patterns)} leaves nothing to train: {type(model).__name__} has no other than the "
        f"{num_parameters} parameters that it freezes; remove a pattern, or make one narrower."
    )
