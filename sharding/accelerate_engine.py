"""Hugging Face Accelerate behind the Engine protocol: DDP everywhere, ZeRO-3 through its FSDP2 plugin on GPUs."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sharding.engine import ModelDefinition, OptimizerFactory
from sharding.loss_scaler import LossScaler
from sharding.mesh import DataParallelMesh
from sharding.torch_engine import TorchEngine


class AccelerateDdpEngine(TorchEngine):
    """A model and optimizer prepared by an Accelerator as DDP."""

    def __init__(
        self,
        definition: ModelDefinition,
        mesh: DataParallelMesh,
        device: torch.device,
        autocast_dtype: torch.dtype | None,
        build_optimizer: OptimizerFactory,
        loss_scaler: LossScaler | None = None,
    ) -> None:
        """See TorchEngine; the process group must be up."""
        super().__init__(definition, mesh, device, autocast_dtype, build_optimizer, loss_scaler)
        self._accelerator = build_accelerator(device)
        self._ddp, self._prepared_optimizer = self._accelerator.prepare(self._model, self._optimizer)
        _check_wrapped(self._ddp, self._accelerator, mesh)

    def _forward_module(self) -> nn.Module:
        return self._ddp

    def _backward(self, loss: torch.Tensor) -> None:
        self._accelerator.backward(loss)

    def _apply_optimizer(self) -> None:
        self._prepared_optimizer.step()

    def _gradient_scale(self) -> float:
        # DDP averages over ranks; the loss is a global sum over a global count.
        return float(self._mesh.dp_degree)

    def _accumulation_context(self, *, is_last: bool) -> AbstractContextManager[Any]:
        return nullcontext() if is_last else self._accelerator.no_sync(self._ddp)

    def _is_written_here(self, index: int) -> bool:
        return index % self._mesh.dp_degree == self._mesh.dp_rank


def build_accelerator(device: torch.device, **plugins: Any) -> Any:
    """An Accelerator over the process group that is up; precision and accumulation stay ours."""
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.state import AcceleratorState, GradientState

    # Both are singletons that a second engine in one process would inherit.
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return Accelerator(
        cpu=device.type == "cpu",
        mixed_precision="no",
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False)],
        **plugins,
    )


def _check_wrapped(model: nn.Module, accelerator: Any, mesh: DataParallelMesh) -> None:
    """Assert that the model is what the strategy says: Accelerate trains something else without a word at times.

    Raises:
        RuntimeError: it is not, or Accelerate sees another number of ranks.
    """
    is_right = isinstance(model, DistributedDataParallel) or mesh.dp_degree == 1
    if not is_right or accelerator.num_processes != mesh.dp_degree:
        raise RuntimeError(
            f"Accelerate made {type(model).__name__} on {accelerator.num_processes} processes of what was to be DDP on "
            f"{mesh.dp_degree}"
        )
