"""Which parameters backward comes to: one that it does not come to has no gradient, and is not to be updated."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn


class ReachedParameters:
    """Of each step the parameters that no micro-batch of any rank reached.

    In one plain process such a parameter has no gradient, and the optimizer leaves it alone: no decay, no moments.
    Where all gradients lie in memory that ranks exchange, it has zeros instead, and only this tells them from others.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        group: dist.ProcessGroup | None,
        *,
        must_be_alike: bool = False,
    ) -> None:
        """Attach to parameters.

        Args:
            parameters: the trainable ones, in the same order on every rank; they are known by their index.
            group: the ranks.
            must_be_alike: whether the ranks' gradients are added up wrongly where one has reached what another has not.
        """
        self._must_be_alike = must_be_alike
        self._num_parameters = len(parameters)
        self._group = group
        # Since the last step, and in it.
        self._missed = set(range(len(parameters)))
        self._missed_here: list[int] = []
        # On the host, where it is known: over gloo, so that nobody waits for a device to ask.
        self._all_reached = torch.ones(len(parameters), dtype=torch.int32)
        self._reached = self._all_reached
        self._work: dist.Work | None = None
        for index, parameter in enumerate(parameters):
            parameter.register_hook(lambda gradient, index=index: self._arrived(index, gradient))

    def share(self) -> None:
        """After a step's last backward pass: begin to tell the other ranks. Every rank must call it."""
        self.wait()
        self._missed_here, self._missed = sorted(self._missed), set(range(self._num_parameters))
        # What is all ones stays so by a maximum, whatever the others say.
        self._reached = self._all_reached
        if self._missed_here:
            self._reached = self._all_reached.clone()
            self._reached[self._missed_here] = 0
        self._work = dist.all_reduce(self._reached, dist.ReduceOp.MAX, group=self._group, async_op=True)

    def wait(self) -> None:
        """Wait for the exchange."""
        if self._work is not None:
            self._work.wait()
            self._work = None

    def unreached(self) -> list[int]:
        """The parameters that no rank reached in the step that was shared last.

        Waits for the other ranks where this rank itself missed one, and for nothing elsewhere.

        Raises:
            RuntimeError: other ranks have reached what this one has not, and that must not be. Not all ranks know it,
                so this rank's end must end them.
        """
        if not self._missed_here:
            return []
        self.wait()
        reached = self._reached.tolist()
        if self._must_be_alike and any(reached[index] for index in self._missed_here):
            raise RuntimeError(
                "this rank has a parameter without a gradient that has one on another rank, and gradients would be "
                "added up wrongly; use parallel.strategy=ddp with parallel.backend=torch, or parallel.backend=bucketed."
            )
        return [index for index in self._missed_here if not reached[index]]

    def _arrived(self, index: int, gradient: torch.Tensor | None) -> None:
        # Without one where backward was only led here.
        if gradient is not None:
            self._missed.discard(index)
