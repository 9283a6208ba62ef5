"""The Engine: how a model's state lies on ranks, and what the trainer may ask of it.

An engine owns the accumulation loop, so that it can decide when gradients travel. The trainer owns the denominator.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from sharding.initialization import InitializeModule
from sharding.part import Part

Batch = dict[str, torch.Tensor]
"""A micro-batch by name, on the host or the device; dim 0 of each tensor is the sample.

Packed tokens are ``input_ids`` and ``labels``, int64 [micro, length], where a label is -100 at a position without a
target, and ``position_ids``, int64 [micro, length], where documents are kept apart.
"""

LossFunction = Callable[[nn.Module, Batch], torch.Tensor]
"""Sum of the losses of a batch's valid targets, a scalar with a gradient."""

EvaluationFunction = Callable[[nn.Module, Batch], torch.Tensor]
"""A vector of sums, fp64, which add up over batches and ranks to a task's evaluation metrics."""


OptimizerFactory = Callable[[Sequence[Part]], torch.optim.Optimizer]
"""Builds the optimizer after sharding, from a part of each trained parameter under the parameter's own name.

Their tensors are plain fp32 parameters, and may be empty. Where ``rows`` of a part are known and it has ``sums_over``,
the rows of the whole are divided over that group as ``torch.chunk`` would.

Its state must be plain tensors: scalars that are the same on every rank, and tensors whose dim 0 is divided over ranks
as the parameter's is. An optimizer that keeps others, whole on every rank, says which by a method
``holds_whole(parameter, key)``. Where its attribute ``found_inf`` is 1, ``step`` must change nothing, without a host
sync, but create what state is missing, as it is before the first step. Where its attribute ``grad_scale`` is a scalar
on the device, and not None, ``step`` divides gradients by it, and may leave them in memory either way; it says that it
does by ``_step_supports_amp_scaling``, as torch's fused optimizers do, and gets divided gradients otherwise. Parameters
without a gradient are left alone. A group's ``lr_scale`` multiplies the learning rate.
"""


@dataclass(frozen=True)
class ModelDefinition:
    """A model on the meta device and what is needed to bring it to life and train it.

    Attributes:
        model: the module, its parameters and buffers without memory.
        initialize: initialises one module's own tensors from torch's default generator.
        loss: the training loss.
        evaluate: the evaluation sums.
        seed: the run's seed.
    """

    model: nn.Module
    initialize: InitializeModule
    loss: LossFunction
    evaluate: EvaluationFunction
    seed: int


class Engine(Protocol):
    """What every backend and strategy offers."""

    @property
    def loss_scale(self) -> torch.Tensor | None:
        """Present loss scale under fp16, a scalar on the device; None elsewhere."""

    def train_batch(self, micro_batches: Sequence[Batch], denominator: int) -> torch.Tensor:
        """Run forward and backward over one rank's micro-batches and reduce the gradients.

        Args:
            micro_batches: this rank's share of the global batch, whole sequences, on the host or the device.
            denominator: what the summed loss is divided by: valid targets of the whole global batch.

        Returns:
            This rank's sum of losses over all its micro-batches, a detached scalar on the device; 0 on a rank whose
            loss does not count (``ParallelDims.counts_loss``). Where it is not finite, the gradients of all ranks have
            become NaN.
        """

    def train_batch_with_norms(
        self, micro_batches: Sequence[Batch], denominator: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``train_batch``, and the squared norm of each micro-batch's share of the gradient.

        A share is the gradient of the micro-batch's summed loss over the global denominator: the shares of all ranks
        add up to the gradient whose norm ``clip_grad_norm`` returns. Every rank must call it.

        Returns:
            What ``train_batch`` returns, and the squares, fp64 [micro-batches] on the device.

        Raises:
            UserError: DeepSpeed does not show each micro-batch's own gradient.
        """

    def named_local_gradients(self) -> dict[str, torch.Tensor]:
        """Parameter name to this rank's live part of the reduced gradient; between ``train_batch`` and ``step``.

        It lies as ``named_local_shards`` do. What no gradient has come to may be missing. Empty under DeepSpeed, which
        keeps gradients to itself.

        The values are what the optimizer would get now: without fp16's loss scale, and clipped after
        ``clip_grad_norm``. That takes a pass over memory which the step otherwise spares, so that tensors of an earlier
        call, and a parameter's ``grad``, may still be scaled.
        """

    def evaluate(self, batches: Iterable[Batch]) -> list[torch.Tensor]:
        """Run the evaluation function on one batch after another, without gradients.

        Every rank must call it equally often, with equally many batches.

        Args:
            batches: on the host or the device; each is asked for when its pass on this rank begins, so that whoever
                makes it may seed the generators that the pass draws from.

        Returns:
            This rank's sums for each batch, in their order, on the device; 0 where they do not count.
        """

    def clip_grad_norm(self, max_norm: float) -> torch.Tensor:
        """Have the step scale gradients so that their global L2 norm is at most ``max_norm`` (0: leave them).

        Returns:
            The norm before clipping, a scalar on the device, equal on all ranks; not finite where any rank's
            gradient or loss was not.
        """

    def step(self, learning_rate: float) -> torch.Tensor:
        """Apply the optimizer unless the norm of the gradients is not finite, and drop them.

        Where ``clip_grad_norm`` was not called since ``train_batch``, the norm is taken here and nothing is clipped.

        Returns:
            1.0 where the parameters were updated and 0.0 where all ranks skipped, a scalar on the device.
        """

    def settle(self) -> None:
        """Wait for what this rank has begun and not yet waited for, before a profiler or the process group ends."""

    def drop_gradients(self) -> None:
        """Forget the gradients in place of a step: nothing else changes. Every rank must call it."""

    def state(self, *, with_optimizer: bool) -> list[Part]:
        """This rank's part of each tensor of the canonical state; the tensors are live.

        With the optimizer every rank must call it, for what is missing of its state is created.
        """

    def load_state(self, read: Callable[[Part], None], *, with_optimizer: bool) -> None:
        """Let ``read`` fill each part of the canonical state in place."""

    def named_local_shards(self) -> dict[str, torch.Tensor]:
        """Parameter name to this rank's live part of the fp32 master."""

    def replicas(self) -> list[Part]:
        """Parameters of which other ranks hold copies between steps; none where each rank's are its own."""

    def named_parameters(self) -> list[tuple[str, Any]]:
        """Parameter name to the parameter as the strategy holds it."""
