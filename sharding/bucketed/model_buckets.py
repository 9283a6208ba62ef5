"""Which parameters lie in which bucket, and which buckets stay whole between their uses."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from sharding.bucketed.flat_buckets import FlatBucket, flatten_parameters
from sharding.parallel_dims import Role


@dataclass(frozen=True)
class ModelBuckets:
    """All parameters of a model.

    Attributes:
        groups: buckets of what is trained, in the order in which backward fills them: within a group it may fill them
            in another one.
        frozen: buckets of what is not trained.
        blocks: the model's blocks, in forward order.
        freed: of each block its own buckets, those that are trained and those that are frozen, which are whole only
            while they are used; all other buckets stay.
    """

    groups: list[list[FlatBucket]]
    frozen: list[FlatBucket]
    blocks: list[nn.Module]
    freed: list[tuple[list[FlatBucket], list[FlatBucket]]]

    @property
    def trained(self) -> list[FlatBucket]:
        """Of all groups."""
        return [bucket for group in self.groups for bucket in group]


class ModelFlattening:
    """Moves a model into buckets, which under zero3 is built block by block, so that no rank ever holds all of it."""

    def __init__(self, model: nn.Module, place: Role, dtype: torch.dtype, max_elements: int) -> None:
        """Look at a model whose parameters need no memory yet.

        Args:
            model: the model; parameters that several modules share are none of a block's.
            place: this rank's among the ranks that divide each bucket.
            dtype: format in which the model computes.
            max_elements: see ``flatten_parameters``.
        """
        self._model = model
        self._place = place
        self._dtype = dtype
        self._max_elements = max_elements
        every = list(model.named_parameters(remove_duplicate=False))
        num_uses = Counter(id(parameter) for _, parameter in every)
        self._shared = {name for name, parameter in every if num_uses[id(parameter)] > 1}
        # Of the blocks that were added.
        self._trained: list[list[FlatBucket]] = []
        self._frozen: list[list[FlatBucket]] = []

    def add(self, name: str, block: nn.Module) -> None:
        """Flatten the next block, whose parameters have their initial values; all but the first will be freed."""
        parameters = [(f"{name}.{inner}", parameter) for inner, parameter in block.named_parameters()]
        own = [(name, parameter) for name, parameter in parameters if name not in self._shared]
        is_freed = bool(self._trained)
        self._trained.append(self._flatten([(name, p) for name, p in own if p.requires_grad], is_freed=is_freed))
        self._frozen.append(self._flatten([(name, p) for name, p in own if not p.requires_grad], is_freed=is_freed))

    def finish(self, blocks: Sequence[nn.Module]) -> ModelBuckets:
        """Flatten all that was not added.

        Args:
            blocks: of the model, in forward order; either all were added or none.
        """
        added = [bucket for buckets in (*self._trained, *self._frozen) for bucket in buckets]
        done = {id(member.parameter) for bucket in added for member in bucket.members}
        frozen: list[tuple[str, nn.Parameter]] = []
        before: list[tuple[str, nn.Parameter]] = []
        after: list[tuple[str, nn.Parameter]] = []
        place = before
        for name, parameter in self._model.named_parameters():
            if id(parameter) in done:
                place = after
            elif parameter.requires_grad:
                place.append((name, parameter))
            else:
                frozen.append((name, parameter))
        groups = [self._flatten(after), *reversed(self._trained), self._flatten(before)]
        freed = [*zip(self._trained, self._frozen, strict=True)][1:]
        return ModelBuckets(
            groups=[group for group in groups if group],
            frozen=[*(bucket for buckets in self._frozen for bucket in buckets), *self._flatten(frozen)],
            blocks=list(blocks),
            freed=[*[([], [])] * (len(blocks) - len(freed)), *freed],
        )

    def _flatten(self, parameters: list[tuple[str, nn.Parameter]], *, is_freed: bool = False) -> list[FlatBucket]:
        by_dtype: dict[torch.dtype, list[tuple[str, nn.Parameter]]] = {}
        for name, parameter in parameters:
            by_dtype.setdefault(parameter.dtype, []).append((name, parameter))
        return [
            bucket
            for dtype, members in by_dtype.items()
            for bucket in flatten_parameters(
                members,
                self._place,
                self._max_elements,
                self._dtype if dtype.is_floating_point else dtype,
                is_freed=is_freed,
            )
        ]
