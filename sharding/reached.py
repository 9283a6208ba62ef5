"""Which parameters backward comes to: one that it does not come to has no gradient, and is not to be updated."""

from collections.abc import Callable, Collection, Sequence

import torch
import torch.distributed as dist
from torch import nn


class ReachedParameters:
    """Of each step the parameters that no micro-batch of any rank reached.

    In one plain process such a parameter has no gradient, and the optimizer leaves it alone: no decay, no moments.
    Where all gradients lie in memory that ranks exchange, it has zeros instead, and only this tells them from others.

    Ranks have to tell each other in every step, for one that has reached all does not know what others have missed: by
    ``exchange``, or with something else that travels then. Where ranks compute on the cores that carry messages, one
    more collective took 8 % of a step of 16 ms.
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
        self._sums: torch.Tensor | None = None
        self._work: dist.Work | None = None
        for index, parameter in enumerate(parameters):
            parameter.register_hook(_arrival(self._missed, index))

    def end_step(self) -> None:
        """After a step's last backward pass: what is reached from now on is of the next one."""
        self.wait()
        self._missed_here, self._sums = sorted(self._missed), None
        self._missed.update(range(self._num_parameters))

    def exchange(self) -> None:
        """After ``end_step``: begin to tell the other ranks in a collective of its own. Every rank must call it."""
        # On the host, where it is known: over gloo, so that nobody waits for a device to ask.
        self._sums = _write_flags(torch.empty(self._num_parameters, dtype=torch.int32), self._missed_here)
        self._work = dist.all_reduce(self._sums, group=self._group, async_op=True)

    def flags(self) -> torch.Tensor:
        """After ``end_step``, what to tell the other ranks: fp64 [parameters], 1 where this one reached it, else 0."""
        return _write_flags(torch.empty(self._num_parameters, dtype=torch.float64), self._missed_here)

    def write_flags(self, flags: torch.Tensor) -> None:
        """Before ``end_step``, when all that the step comes to is reached: write what to tell the other ranks."""
        _write_flags(flags, self._missed)

    def hear(self, sums: torch.Tensor) -> None:
        """After ``end_step``: all ranks' flags, added up; looked at only where this rank missed a parameter."""
        self._sums = sums

    def wait(self) -> None:
        """Wait for the exchange."""
        if self._work is not None:
            self._work.wait()
            self._work = None

    def unreached(self) -> list[int]:
        """The parameters that no rank reached in the step that ended last.

        Waits for the other ranks where this rank itself missed one, and for nothing elsewhere.

        Raises:
            RuntimeError: other ranks have reached what this one has not, and that must not be. Not all ranks know it,
                so this rank's end must end them.
        """
        if not self._missed_here:
            return []
        self.wait()
        assert self._sums is not None, "ranks have told each other"
        num_reached = self._sums.tolist()
        if self._must_be_alike and any(num_reached[index] for index in self._missed_here):
            raise RuntimeError(
                "this rank has a parameter without a gradient that has one on another rank, and gradients would be "
                "added up wrongly; use parallel.strategy=ddp with parallel.backend=torch, or parallel.backend=bucketed."
            )
        return [index for index in self._missed_here if not num_reached[index]]


def _arrival(missed: set[int], index: int) -> Callable[[torch.Tensor | None], None]:
    """A hook of a parameter, called for each of its gradients: of as little Python as there can be."""

    def arrived(gradient: torch.Tensor | None) -> None:
        # Without one where backward was only led here.
        if gradient is not None:
            missed.discard(index)

    return arrived


def _write_flags(flags: torch.Tensor, missed: Collection[int]) -> torch.Tensor:
    flags.fill_(1)
    if missed:
        flags[list(missed)] = 0
    return flags
