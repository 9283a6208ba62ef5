"""DDP: every rank holds everything; gradients are all-reduced once per step."""

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sharding.engine import ModelDefinition, OptimizerFactory
from sharding.loss_scaler import LossScaler
from sharding.mesh import ParallelMesh
from sharding.part import Part
from sharding.reached import ReachedParameters
from sharding.torch_engine import TorchEngine

_FLAGS_NAME = "reached_flags"


class DdpEngine(TorchEngine):
    """torch's DistributedDataParallel, silent until the last micro-batch."""

    def __init__(
        self,
        definition: ModelDefinition,
        mesh: ParallelMesh,
        device: torch.device,
        copies_dtype: torch.dtype | None,
        build_optimizer: OptimizerFactory,
        loss_scaler: LossScaler | None = None,
    ) -> None:
        """See TorchEngine; the process group must be up."""
        super().__init__(definition, mesh, device, copies_dtype, build_optimizer, loss_scaler)
        self._led_to = [entry.parameter for entry in self._trainable]
        reached = self._reached = ReachedParameters(self._led_to, mesh.reduction_group)
        # Its gradient, which lies in the last bucket, tells what each rank reached; None where that is exchanged.
        self._flags: nn.Parameter | None = None
        self._reduction = _Reduction(mesh.reduction_group, reached)
        self._ddp = self._wrap()
        self._fix_buckets()
        # All were reached just now; and only buckets in this order have the flags in the last one.
        reached.end_step()
        self._reduction.flags = self._flags
        self._is_last = False

    def _wrap(self) -> Any:
        # On a GPU a collective of the host's costs the device nothing, and nobody waits for the device to hear of it.
        if self._device.type == "cpu" and {parameter.dtype for parameter in self._led_to} == {torch.float32}:
            # Buckets are by format: of one format, what is last in order is in the last one.
            self._flags = nn.Parameter(torch.zeros(len(self._led_to)))
            self._led_to.append(self._flags)
        with _registered(self._model, self._flags):
            ddp = DistributedDataParallel(
                self._model,
                device_ids=[self._device.index] if self._device.type == "cuda" else None,
                process_group=self._mesh.reduction_group,
                gradient_as_bucket_view=True,
                **_no_buffer_sync(),
            )
        ddp.register_comm_hook(self._reduction, _sum_bucket)
        return ddp

    def _fix_buckets(self) -> None:
        """Have DDP order its buckets anew now, which it does once, after the first pass that it reduces.

        Where more than two ranks add up, the place of an element in its bucket says in which order. A process that
        continues a run would add up its first step in another order than one that has been running.
        """
        if isinstance(self._ddp, DistributedDataParallel):
            self._ddp.reducer.prepare_for_forward()
            self._ddp.reducer.prepare_for_backward([])
            # Last first, as backward comes to them, and then the flags.
            parameters = [entry.parameter for entry in reversed(self._trainable)]
            for parameter in [*parameters, *([] if self._flags is None else [self._flags])]:
                parameter.backward(torch.zeros_like(parameter))

    def replicas(self) -> list[Part]:
        """See Engine."""
        return [self._part(*named) for named in self.named_parameters()]

    def drop_gradients(self) -> None:
        """See Engine; gradients stay views of DDP's buckets.

        Without them the next step's first micro-batches would be accumulated beside the buckets, twice the memory.
        """
        gradients = [entry.parameter.grad for entry in self._trainable if entry.parameter.grad is not None]
        if gradients:
            torch._foreach_zero_(gradients)

    def _forward_module(self) -> nn.Module:
        return self._ddp

    def _backward(self, loss: torch.Tensor) -> None:
        if self._is_last:
            # A bucket leaves when all its parameters have been reached, on every rank, or never.
            loss = _ReachAll.apply(loss, *self._led_to)
        self._run_backward(loss)

    def _tell_reached(self, reached: ReachedParameters) -> None:
        if self._flags is None:
            reached.exchange()
        else:
            assert self._flags.grad is not None, "the last pass led to it"
            reached.hear(self._flags.grad)

    def _run_backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def _accumulation_context(self, *, is_last: bool) -> AbstractContextManager[Any]:
        self._is_last = is_last
        # no_sync must span the forward pass too: DDP decides there whether the reducer is armed.
        return nullcontext() if is_last else self._ddp.no_sync()


@dataclass
class _Reduction:
    """What the communication hook needs; ``flags`` once they lie in the last bucket."""

    group: dist.ProcessGroup | None
    reached: ReachedParameters
    flags: nn.Parameter | None = None


@contextmanager
def _registered(model: nn.Module, flags: nn.Parameter | None) -> Iterator[None]:
    """A model that has one more parameter for a while."""
    if flags is None:
        yield
        return
    model.register_parameter(_FLAGS_NAME, flags)
    try:
        yield
    finally:
        delattr(model, _FLAGS_NAME)


class _ReachAll(torch.autograd.Function):
    """A loss whose backward pass comes to every parameter, with no gradient of its own for any.

    What the loss does not depend on, on this rank, then contributes zeros to its bucket. ``find_unused_parameters``
    does the same at the price of a walk through the graph and one more all-reduce.
    """

    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        ctx.num_parameters = len(parameters)
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return (gradients[0], *[None] * ctx.num_parameters)


def _sum_bucket(reduction: _Reduction, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Sum a bucket over ranks, as a communication hook of DDP.

    DDP by itself divides by the number of ranks, which takes a pass over all gradients; the loss carries the global
    denominator already.
    """
    flags = reduction.flags
    if flags is not None and flags.grad is not None and bucket.is_last():
        # Buckets leave in order, each when all its parameters were come to: nothing that this step reaches is left.
        if flags.grad.untyped_storage().data_ptr() != bucket.buffer().untyped_storage().data_ptr():
            raise RuntimeError("DDP has laid its buckets so that what ranks reached is not in the last of them")
        reduction.reached.write_flags(flags.grad)
    summed = dist.all_reduce(bucket.buffer(), group=reduction.group, async_op=True)
    return summed.get_future().then(lambda done: done.value()[0])


def _no_buffer_sync() -> dict[str, Any]:
    """Buffers are the same everywhere and stay so; torch 2.13 renamed the argument that says it."""
    parameters = inspect.signature(DistributedDataParallel.__init__).parameters
    return {"forward_sync_buffers" if "forward_sync_buffers" in parameters else "broadcast_buffers": False}
