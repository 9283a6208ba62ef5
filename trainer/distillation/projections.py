"""Linear maps from what a student's blocks give out to the width of its teacher's, trained with the student.

Jiao et al., "TinyBERT: Distilling BERT for Natural Language Understanding" (2020), equation 8.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from sharding.ranks.errors import UserError
from sharding.state import PROJECTIONS
from trainer.architectures.config import field
from trainer.config.distill import LayerPair
from trainer.data.facts import SampleFacts
from trainer.distillation.hidden_states import block_at, recorded
from trainer.model.tried_activations import columns_without_values

# Batch normalisation in training takes no single row.
_TRIAL_ROWS = 2
# Of images dim -1 is a place, and not what is found there.
_MOST_DIMS = 3


def hidden_size(model: nn.Module) -> int | None:
    """Width of all blocks of a model of `transformers`; None where there is no such number."""
    text_config: Any = getattr(getattr(model, "config", None), "get_text_config", lambda: None)()
    width = None if text_config is None else field(text_config, "hidden_size")
    return width if isinstance(width, int) else None


def output_widths(model: nn.Module, facts: SampleFacts, numbers: Sequence[int], whose: str) -> tuple[int, ...]:
    """Elements of dim -1 of what blocks give out, one number for each; what is wrong is seen when they compute.

    Args:
        model: on the meta device.
        facts: of the samples.
        numbers: of the blocks.
        whose: name of the model, for a sentence.

    Raises:
        UserError: there is no such block, or the model is none of `transformers` and cannot be run without values.
    """
    blocks = [block_at(model, number, f"{whose} has") for number in numbers]
    width = hidden_size(model)
    if width is not None:
        return (width,) * len(blocks)
    taken = inspect.signature(model.forward).parameters
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"), torch.no_grad(), recorded(blocks) as states:
            columns = columns_without_values(facts, _TRIAL_ROWS)
            model(**{name: column for name, column in columns.items() if name in taken})
            found = states()
    except Exception as error:  # noqa: BLE001 - each of many models fails in its own way
        raise UserError(
            f"distill.projection=true must know how wide the outputs of blocks are, but {whose} has no hidden_size and "
            f"cannot be run without values ({type(error).__name__}: {error}); leave distill.projection out, and "
            "choose blocks of one width."
        ) from None
    return tuple(state.shape[-1] for state in found)


def add_projections(
    model: nn.Module, pairs: Sequence[LayerPair], widths: Sequence[tuple[int, int]]
) -> dict[LayerPair, nn.Linear]:
    """Give a model a projection for each pair of blocks, in place; its own forward pass never calls them.

    Args:
        model: the student, on the meta device.
        pairs: numbers of blocks, the student's and the teacher's.
        widths: of their outputs.

    Returns:
        The projections, without memory, which begin as ``reset_parameters`` draws them.

    Raises:
        UserError: the model has a child of their name.
    """
    if hasattr(model, PROJECTIONS):
        raise UserError(
            f"distill.projection=true trains projections that are called {PROJECTIONS}, but {type(model).__name__} "
            "has an attribute of this name; give that another one."
        )
    with torch.device("meta"):
        found = {pair: nn.Linear(own, its, bias=False) for pair, (own, its) in zip(pairs, widths, strict=True)}
    # In no list of modules, by which blocks are found.
    children = nn.ModuleDict({f"{pair[0]}_to_{pair[1]}": projection for pair, projection in found.items()})
    model.add_module(PROJECTIONS, children)
    return found


def project(state: torch.Tensor, projection: nn.Linear, pair: LayerPair) -> torch.Tensor:
    """A student's states at the teacher's width.

    Args:
        state: [samples, width] or [samples, length, width].
        projection: the pair's, called within the model's forward pass, in which its weight is whole.
        pair: the blocks.

    Raises:
        UserError: the states have another shape.
    """
    if state.ndim > _MOST_DIMS or state.shape[-1] != projection.in_features:
        raise UserError(
            f"distill.projection=true makes rows of width {projection.in_features} as wide as the teacher's, but block "
            f"{pair[0]} of the model gives out {list(state.shape)}; choose another block for distill.layers."
        )
    projected: torch.Tensor = projection(state.to(projection.weight.dtype))
    return projected
