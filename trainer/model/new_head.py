"""A head that stored weights lack: it is initialised where ``model.new_head`` asks for that, and all else is there."""

from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from sharding.blocks import find_blocks
from sharding.ranks.errors import UserError

Shapes = Mapping[str, tuple[int, ...]]
"""Of tensors, by name."""


def body_of(model: nn.Module) -> frozenset[str]:
    """Names of the tensors that belong to no head: of blocks, of embeddings, and of a base model of `transformers`.

    A pooler is in the base model, but only some heads have one.

    Args:
        model: the model, before it is sharded.
    """
    modules = [*find_blocks(model), *((n, m) for n, m in model.named_modules() if isinstance(m, nn.Embedding))]
    prefixes = [f"{name}." for name, _ in modules]
    base = getattr(model, "base_model_prefix", "")
    if base and getattr(model, base, None) is not None:
        prefixes.append(f"{base}.")
    return frozenset(
        name
        for name in model.state_dict()
        if name.startswith(tuple(prefixes)) and not name.startswith(f"{base}.pooler.")
    )


def new_head(wanted: Shapes, stored: Shapes, body: Collection[str], source: str, *, may_be_none: bool) -> list[str]:
    """Names of the tensors that are to be initialised, since stored weights do not have them.

    Args:
        wanted: the model's tensors.
        stored: those that there are, under the same names.
        body: see ``body_of``.
        source: where they are stored, to speak of.
        may_be_none: whether it is right that nothing is new.

    Raises:
        UserError: one of the body is lacking too, or no head is new.
    """
    found = [name for name, shape in wanted.items() if stored.get(name) != shape]
    if lacking := [name for name in found if name in body]:
        raise UserError(
            f"{source} has no weights for {_described(lacking[0], wanted, stored)}, which is in the body of the model; "
            "model.new_head=true initialises a head alone: name weights of the same architecture and sizes."
        )
    if len(found) == len(wanted):
        raise UserError(f"{source} has no weights at all that this model has; name those of the same architecture.")
    if not found and not may_be_none:
        raise UserError(
            f"model.new_head=true initialises what stored weights lack, but {source} has all weights of this model in "
            "their shapes; remove it."
        )
    return found


def weights_to_initialize(
    wanted: Shapes, stored: Shapes, body: Collection[str], source: str, *, has_new_head: bool
) -> list[str]:
    """See ``new_head``; without one, nothing may be lacking.

    Raises:
        UserError: something is.
    """
    if has_new_head:
        return new_head(wanted, stored, body, source, may_be_none=False)
    for name, shape in wanted.items():
        if stored.get(name) != shape:
            remedy = "" if name in body else ", or set model.new_head=true to initialise a head"
            raise UserError(
                f"{source} is of another model: it has no weights for {_described(name, wanted, stored)}; continue "
                f"with the model it was saved from{remedy}."
            )
    return []


def describe_new_head(names: Collection[str], wanted: Shapes, stored: Shapes, source: str) -> str:
    """One line for the log."""
    described = ", ".join(_described(name, wanted, stored) for name in names)
    return f"new head: {described} initialised; all else is from {source}"


def shapes_of(tensors: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Their shapes."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _described(name: str, wanted: Shapes, stored: Shapes) -> str:
    return f"{name} {list(wanted[name])}" + (f" (stored: {list(stored[name])})" if name in stored else "")
