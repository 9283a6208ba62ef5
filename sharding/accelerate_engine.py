"""Hugging Face Accelerate behind the Engine protocol: DDP everywhere, ZeRO-3 through its FSDP2 plugin on GPUs."""

import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.nn.parallel import DistributedDataParallel

from sharding.blocks import find_blocks, sharding_units
from sharding.ddp import DdpEngine
from sharding.engine import Engine, ModelDefinition, OptimizerFactory
from sharding.engine_builder import EngineBuilder
from sharding.loss_scaler import LossScaler
from sharding.mesh import ParallelMesh
from sharding.pass_agreement import compare_passes
from sharding.ranks.errors import UserError
from sharding.zero import REDUCES_UNUSED_PARAMETERS, ZeroEngine


class AccelerateDdpEngine(DdpEngine):
    """A model and optimizer prepared by an Accelerator as DDP."""

    def _wrap(self) -> Any:
        self._accelerator = build_accelerator(self._device)
        with warnings.catch_warnings():
            # Newer torch has another name for broadcast_buffers; the plugin's is the old one.
            warnings.simplefilter("ignore", FutureWarning)
            model, self._prepared_optimizer = self._accelerator.prepare(self._model, self._optimizer)
        _check_wrapped(model, self._accelerator, self._mesh)
        return model

    def _gradient_scale(self) -> float:
        # What it wraps averages over ranks; the loss is a global sum over a global count.
        return float(self._mesh.reduction.degree)

    def _run_backward(self, loss: torch.Tensor) -> None:
        self._accelerator.backward(loss)

    def _apply_optimizer(self) -> None:
        self._prepared_optimizer.step()

    def _accumulation_context(self, *, is_last: bool) -> AbstractContextManager[Any]:
        self._is_last = is_last
        # By way of the accelerator, since on one rank the model is not wrapped.
        return nullcontext() if is_last else self._accelerator.no_sync(self._ddp)


class AccelerateZero3Engine(ZeroEngine):
    """A model sharded by Accelerate's FSDP2 plugin, whole on each device until then."""

    def __init__(
        self,
        definition: ModelDefinition,
        mesh: ParallelMesh,
        device: torch.device,
        dtype: torch.dtype,
        build_optimizer: OptimizerFactory,
        loss_scaler: LossScaler | None = None,
    ) -> None:
        """See ZeroEngine; the model is not sharded yet.

        Args:
            definition: the model and its functions.
            mesh: the ranks.
            device: where this rank computes.
            dtype: format of gathered parameters and of computation; gradients are reduced in fp32.
            build_optimizer: called once, with the sharded parameters.
            loss_scaler: for fp16; None elsewhere.

        Raises:
            UserError: the plugin cannot shard the model.
        """
        from accelerate.utils import fsdp2_prepare_model

        blocks = [block for _, block in find_blocks(definition.model)]
        if sharding_units(definition.model, blocks) != [[block] for block in blocks]:
            raise UserError(
                "parallel.backend=accelerate with parallel.strategy=zero3 shards each block by itself, but blocks of "
                f"{type(definition.model).__name__} share parameters; use parallel.backend=torch."
            )
        block_classes = sorted({type(block).__name__ for block in blocks})
        self._accelerator = fsdp_accelerator(device, dtype, block_classes)
        fsdp2_prepare_model(self._accelerator, definition.model)
        if not isinstance(definition.model, FSDPModule) or self._accelerator.num_processes != mesh.reduction.degree:
            raise RuntimeError(
                f"Accelerate made {type(definition.model).__name__} on {self._accelerator.num_processes} processes of "
                f"what was to be FSDP2 on {mesh.reduction.degree}"
            )
        super().__init__(definition, mesh, device, "zero3", build_optimizer, loss_scaler)

    def _backward(self, loss: torch.Tensor) -> None:
        self._accelerator.backward(loss)


class AccelerateZero3Builder(EngineBuilder):
    """Builds Accelerate's zero3: its plugin is given the whole model."""

    def finish(self, model: nn.Module) -> Engine:
        """See EngineBuilder."""
        parts = self._parts
        definition = compare_passes(parts, parts.blocks, compares_parameters=not REDUCES_UNUSED_PARAMETERS)
        return AccelerateZero3Engine(
            definition, parts.mesh, parts.device, parts.dtype, parts.build_optimizer, parts.loss_scaler
        )


def fsdp_accelerator(device: torch.device, dtype: torch.dtype, block_classes: Sequence[str]) -> Any:
    """An Accelerator with the FSDP2 plugin.

    Raises:
        RuntimeError: Accelerate leaves the plugin unused, as it does without a GPU.
    """
    accelerator = build_accelerator(device, fsdp_plugin=fsdp_plugin(dtype, block_classes))
    if str(accelerator.distributed_type.value) != "FSDP":
        raise RuntimeError(f"Accelerate trains with {accelerator.distributed_type.value}, and not with FSDP as told")
    return accelerator


def fsdp_plugin(dtype: torch.dtype, block_classes: Sequence[str]) -> Any:
    """Accelerate's FSDP2 plugin, to shard each block and free its parameters after use."""
    from accelerate import FullyShardedDataParallelPlugin

    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        reshard_after_forward=True,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=list(block_classes),
        cpu_ram_efficient_loading=False,
        mixed_precision_policy=MixedPrecisionPolicy(
            param_dtype=None if dtype is torch.float32 else dtype,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,
        ),
    )


def build_accelerator(device: torch.device, **plugins: Any) -> Any:
    """An Accelerator over the process group that is up; precision and accumulation stay ours."""
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.state import AcceleratorState, GradientState

    # Both are singletons that a second engine in one process would inherit.
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    num_threads = torch.get_num_threads()
    with warnings.catch_warnings():
        # About OMP_NUM_THREADS: the threads of a rank are set already, and are set again below.
        warnings.simplefilter("ignore", UserWarning)
        accelerator = Accelerator(
            cpu=device.type == "cpu",
            mixed_precision="no",
            kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False)],
            **plugins,
        )
    torch.set_num_threads(num_threads)
    return accelerator


def _check_wrapped(model: nn.Module, accelerator: Any, mesh: ParallelMesh) -> None:
    """Assert that the model is what the strategy says: Accelerate trains something else without a word at times.

    Raises:
        RuntimeError: it is not, or Accelerate sees another number of ranks.
    """
    is_right = isinstance(model, DistributedDataParallel) or mesh.reduction.degree == 1
    if not is_right or accelerator.num_processes != mesh.reduction.degree:
        raise RuntimeError(
            f"Accelerate made {type(model).__name__} on {accelerator.num_processes} processes of what was to be DDP on "
            f"{mesh.reduction.degree}"
        )
