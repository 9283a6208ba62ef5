"""Comparison, in the first passes, of what ranks run: before the collectives that this decides.

Where each block's parameters are gathered for all ranks together, two ranks that run different blocks take each other's
for their own: blocks of one size give wrong numbers without a word, others hang.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import nn

from sharding.engine import Batch, LossFunction, ModelDefinition
from sharding.engine_builder import EngineParts
from sharding.graph_leaves import leaves_of
from sharding.ranks.errors import UserError

_NUM_PASSES = 8
"""Forward passes that are compared; a model that draws or decides what it runs does so from the first on."""


def compare_passes(
    parts: EngineParts, gathered: Sequence[tuple[str, nn.Module]], *, compares_parameters: bool
) -> ModelDefinition:
    """The definition of a model with a loss whose first passes ranks compare; as it is where there is one rank.

    Args:
        parts: the model, and how it lies on ranks.
        gathered: see PassAgreement.
        compares_parameters: see PassAgreement.
    """
    definition, parallel = parts.definition, parts.parallel
    if parts.mesh.reduction.degree == 1:
        return definition
    setting = f"parallel.backend={parallel.backend} with parallel.strategy={parallel.strategy}"
    agreement = PassAgreement(
        definition.model, gathered, parts.mesh.reduction_group, setting, compares_parameters=compares_parameters
    )
    return replace(definition, loss=agreement.watch(definition.loss))


class PassAgreement:
    """Compares the modules that ranks come to, one by one, and then the parameters that their losses depend on."""

    def __init__(
        self,
        model: nn.Module,
        gathered: Sequence[tuple[str, nn.Module]],
        group: dist.ProcessGroup | None,
        setting: str,
        *,
        compares_parameters: bool,
    ) -> None:
        """Bind to a model; hooks come with the first pass, when those that gather are there.

        Args:
            model: the model.
            gathered: the modules whose parameters are gathered when they are called, with their names.
            group: the ranks that run the same modules, whose gradients add up; None for all ranks.
            setting: what needs all ranks to do the same, for the sentence to the user.
            compares_parameters: whether parameters that only some ranks use are refused, too.
        """
        self._group = group
        self._setting = setting
        self._names = [*(name for name, _ in gathered), "the end of its pass"]
        self._parameters = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self._compares_parameters = compares_parameters
        self._gathered = [module for _, module in gathered]
        self._num_passes = 0
        self._is_in_pass = False

    def watch(self, loss: LossFunction) -> LossFunction:
        """A training loss whose first passes are compared; every rank must call it equally often.

        It raises UserError, on every rank, where ranks run different blocks or use different parameters.
        """

        def watched(model: nn.Module, batch: Batch) -> torch.Tensor:
            if self._num_passes == _NUM_PASSES:
                return loss(model, batch)
            if self._num_passes == 0:
                self._attach()
            self._num_passes += 1
            self._is_in_pass = True
            value = loss(model, batch)
            self._come_to(len(self._names) - 1)
            self._is_in_pass = False
            if self._compares_parameters:
                self._compare_parameters(value)
            return value

        return watched

    def _attach(self) -> None:
        # They stay, for a block that is compiled would be compiled anew without them.
        for index, module in enumerate(self._gathered):
            hook = torch.compiler.disable(lambda *_, index=index: self._come_to(index))
            module.register_forward_pre_hook(hook, prepend=True)

    def _come_to(self, index: int) -> None:
        if not self._is_in_pass:
            return
        # On the host: nothing waits for the device.
        extremes = torch.tensor([index, -index])
        dist.all_reduce(extremes, dist.ReduceOp.MAX, group=self._group)
        last, first = int(extremes[0]), -int(extremes[1])
        if last != first:
            raise UserError(
                f"{self._setting} needs every rank to run the same blocks in the same order, but in one training pass "
                f"a rank came to {self._names[first]} where another came to {self._names[last]}; let the model run all "
                "blocks on all ranks, or use parallel.strategy=ddp or parallel.backend=bucketed, which need not."
            )

    def _compare_parameters(self, loss: torch.Tensor) -> None:
        reached = {id(leaf): leaf for leaf in leaves_of(loss)}
        used = [int(id(p) in reached) for _, p in self._parameters]
        # Leaves that are no parameters of the model are gathered ones, which have no name.
        own = {id(p) for _, p in self._parameters}
        num_others = sum(leaf.numel() for key, leaf in reached.items() if key not in own)
        found = torch.tensor([*used, num_others])
        extremes = torch.cat([found, -found])
        dist.all_reduce(extremes, dist.ReduceOp.MAX, group=self._group)
        most, least = extremes[: len(found)], -extremes[len(found) :]
        if bool((most != least).any()):
            names = [name for (name, _), differs in zip(self._parameters, most != least, strict=False) if differs]
            found_here = f"{names[0]} was" if names else "some parameters were"
            raise UserError(
                f"{self._setting} needs the losses of all ranks to depend on the same parameters, but in one training "
                f"pass {found_here} used by some ranks only; let the model use it on all of them (times zero, say), or "
                "use parallel.strategy=ddp or parallel.backend=bucketed, which take its gradient for zero."
            )
