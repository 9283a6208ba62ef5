"""DeepSpeed's ZeRO stages 1 to 3 behind the Engine protocol, with canonical state."""

import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from sharding.engine import Batch, ModelDefinition, OptimizedParameter, OptimizerFactory
from sharding.loss_scaler import LossScaler
from sharding.mesh import DataParallelMesh
from sharding.state import TensorSlice, slice_of, slices_of_flat_range


def partition_block(block: nn.Module, settings: dict[str, Any]) -> None:
    """Divide a block's parameters over all ranks as ZeRO-3 wants them, in place; frees what this rank does not keep."""
    deepspeed = _import_deepspeed()
    deepspeed.zero.Init(module=block, config_dict_or_path=settings, dtype=torch.float32)


class DeepSpeedEngine:
    """A model in DeepSpeed's hands.

    DeepSpeed holds fp32 parameters, reduces, clips and steps; it finds a non-finite norm by itself and skips on all
    ranks. Mixed precision is torch's autocast inside the model, since DeepSpeed's own 16-bit modes accumulate and
    reduce gradients in 16 bits.
    """

    def __init__(
        self,
        definition: ModelDefinition,
        mesh: DataParallelMesh,
        device: torch.device,
        autocast_dtype: torch.dtype | None,
        build_optimizer: OptimizerFactory,
        settings: dict[str, Any],
        loss_scaler: LossScaler | None = None,
    ) -> None:
        """Hand the model over; the process group must be up.

        Args:
            definition: the model, whole (stages 1 and 2) or partitioned block by block (stage 3), and its functions.
            mesh: the ranks.
            device: where this rank computes.
            autocast_dtype: format of matrix products; None for fp32.
            build_optimizer: called once, before DeepSpeed cuts the parameters: with an elementwise optimizer.
            settings: DeepSpeed's configuration.
            loss_scaler: for fp16; None elsewhere.
        """
        deepspeed = _import_deepspeed()
        self._definition = definition
        self._mesh = mesh
        self._device = device
        self._loss_scaler = loss_scaler
        trainable = [(name, p) for name, p in definition.model.named_parameters() if p.requires_grad]
        parameters = [
            OptimizedParameter(name, p, _whole_shape(p), 0, None, is_hidden_matrix=False) for name, p in trainable
        ]
        _autocast_forward(definition.model, device, autocast_dtype)
        self._module, *_ = deepspeed.initialize(
            model=definition.model, optimizer=build_optimizer(parameters), config=settings, dist_init_required=False
        )
        self._zero = self._module.optimizer
        self._stage = self._module.zero_optimization_stage()
        if self._stage != settings["zero_optimization"]["stage"]:
            raise RuntimeError(f"DeepSpeed trains with stage {self._stage}, not as configured: {settings}")
        self._trainable = trainable

    @property
    def loss_scale(self) -> torch.Tensor | None:
        """See Engine."""
        return None if self._loss_scaler is None else self._loss_scaler.scale

    def train_batch(self, micro_batches: Sequence[Batch], denominator: int) -> torch.Tensor:
        """See Engine."""
        total = torch.zeros((), device=self._device)
        # DeepSpeed averages over ranks; the loss is a global sum over a global count.
        scale = self._mesh.dp_degree / max(denominator, 1)
        if self._loss_scaler is not None:
            # DeepSpeed scales by a number of the host's; its step waits for the device in any case.
            self._zero.override_loss_scale(float(self._loss_scaler.scale))
        for index, batch in enumerate(micro_batches):
            self._module.set_gradient_accumulation_boundary(index == len(micro_batches) - 1)
            loss_sum = self._definition.loss(self._module, self._to_device(batch))
            factor = torch.where(loss_sum.detach().isfinite(), scale, torch.nan)
            self._module.backward(loss_sum * factor, scale_wrt_gas=False)
            total += loss_sum.detach()
        return total

    def evaluate_batch(self, batch: Batch) -> torch.Tensor:
        """See Engine."""
        self._module.eval()
        with torch.no_grad():
            sums = self._definition.evaluate(self._module, self._to_device(batch))
        self._module.train()
        return sums

    def clip_grad_norm(self, max_norm: float) -> torch.Tensor:
        """See Engine; DeepSpeed scales the gradients within its step, to the norm in its configuration."""
        if max_norm != self._module.gradient_clipping():
            raise RuntimeError(
                f"DeepSpeed was set up to clip to {self._module.gradient_clipping()}, but is asked for {max_norm}"
            )
        norm = self._norm()
        if self._loss_scaler is not None:
            norm = norm / self._loss_scaler.scale
        return norm

    def step(self, learning_rate: float) -> torch.Tensor:
        """See Engine."""
        for group in self._base_optimizer.param_groups:
            group["lr"] = learning_rate * group.get("lr_scale", 1.0)
        self._module.step()
        skipped = torch.tensor(float(bool(self._zero.overflow)), device=self._device)
        if self._loss_scaler is not None:
            self._loss_scaler.update(skipped)
        return 1.0 - skipped

    def drop_gradients(self) -> None:
        """See Engine."""
        # DeepSpeed keeps gradients in many places, and only its own step forgets all of them: it does so, and changes
        # nothing else, where the norm that it computes is not finite.
        infinite = torch.full((), torch.inf, device=self._device)
        if self._stage == 3:
            self._zero._get_norm_groups = lambda: [infinite]
        else:
            self._zero.scaled_global_norm = lambda: infinite
        try:
            self._module.step()
        finally:
            # The class's own method is behind it.
            del self._zero.__dict__["_get_norm_groups" if self._stage == 3 else "scaled_global_norm"]

    def state(self, *, with_optimizer: bool) -> list[TensorSlice]:
        """See Engine; a rank's part of a flat partition becomes boxes of each tensor."""
        slices = [part for name, p in self._trainable for part in self._slices(f"model/{name}", p, None)]
        slices += self._replicated_slices()
        if not with_optimizer:
            return slices
        for name, parameter in self._trainable:
            for key, value in sorted(self._moments(parameter).items()):
                if value.ndim:
                    slices += self._slices(f"optimizer/{name}/{key}", parameter, key)
                else:
                    # A count of steps: one for each flat partition, the same on every rank.
                    written = self._mesh.dp_rank == 0
                    slices.append(slice_of(f"optimizer/{name}/{key}", value, is_written_here=written))
        if self._loss_scaler is not None:
            slices += self._loss_scaler.slices(is_written_here=self._mesh.dp_rank == 0)
        return slices

    def load_state(self, read: Callable[[TensorSlice], None], *, with_optimizer: bool) -> None:
        """See Engine."""
        if with_optimizer:
            self._allocate_optimizer_state()
        for part in self.state(with_optimizer=with_optimizer):
            read(part)
        self._publish_masters()

    def named_local_shards(self) -> dict[str, torch.Tensor]:
        """See Engine; a flat run of the parameter's elements."""
        return {name: self._run(parameter, None)[0] for name, parameter in self._trainable}

    def named_parameters(self) -> list[tuple[str, Any]]:
        """See Engine."""
        return list(self._definition.model.named_parameters())

    @property
    def _base_optimizer(self) -> torch.optim.Optimizer:
        return self._zero.optimizer

    def _to_device(self, batch: Batch) -> Batch:
        return {name: tensor.to(self._device, non_blocking=True) for name, tensor in batch.items()}

    def _norm(self) -> torch.Tensor:
        if self._stage == 3:
            from deepspeed.runtime.zero.stage3 import combine_grad_norm_groups

            norm = combine_grad_norm_groups(self._zero._get_norm_groups())
        else:
            norm = self._zero.scaled_global_norm()
        norm = torch.as_tensor(norm, device=self._device).float()
        # DeepSpeed's word for a norm that is not finite is -1.
        return torch.where(norm < 0, torch.inf, norm)

    def _slices(self, name: str, parameter: nn.Parameter, key: str | None) -> list[TensorSlice]:
        run, start = self._run(parameter, key)
        shape = _whole_shape(parameter)
        return slices_of_flat_range(name, run, shape, start, is_written_here=True)

    def _replicated_slices(self) -> list[TensorSlice]:
        model, written = self._definition.model, self._mesh.dp_rank == 0
        persistent = set(model.state_dict().keys())
        buffers = [(name, buffer) for name, buffer in model.named_buffers() if name in persistent]
        frozen = [(name, p) for name, p in model.named_parameters() if not p.requires_grad]
        return [slice_of(f"model/{name}", tensor, is_written_here=written) for name, tensor in buffers + frozen]

    def _run(self, parameter: Any, key: str | None) -> tuple[torch.Tensor, int]:
        """This rank's live run of a parameter's elements in its master or a moment, and where the run starts."""
        if self._stage == 3:
            group, offset, _ = self._zero.grad_position[self._zero.get_param_id(parameter)]
            flat = self._zero.fp32_partitioned_groups_flat[group]
            partition = parameter.ds_tensor.ds_numel
            start = self._mesh.dp_rank * partition
            size = max(0, min(partition, parameter.ds_numel - start))
        else:
            mapping = parameter._hp_mapping
            group = self._group_index(parameter)
            flat = self._zero.single_partition_of_fp32_groups[group]
            if mapping is None:
                return flat.detach()[:0], 0
            offset, size = mapping.hp_fragment_address.start, mapping.hp_fragment_address.numel
            start = mapping.lp_fragment_address.start
        source = flat if key is None else self._base_optimizer.state[flat][key]
        return source.detach()[offset : offset + size], start

    def _moments(self, parameter: nn.Parameter) -> dict[str, torch.Tensor]:
        if self._stage == 3:
            flat = self._zero.fp32_partitioned_groups_flat[
                self._zero.grad_position[self._zero.get_param_id(parameter)][0]
            ]
        else:
            flat = self._zero.single_partition_of_fp32_groups[self._group_index(parameter)]
        return {key: value for key, value in self._base_optimizer.state.get(flat, {}).items() if value is not None}

    def _group_index(self, parameter: nn.Parameter) -> int:
        for index, group in enumerate(self._zero.bit16_groups):
            if any(parameter is member for member in group):
                return index
        raise RuntimeError("DeepSpeed does not hold a parameter that it was given")

    def _flat_masters(self) -> Iterator[tuple[dict[str, Any], torch.Tensor]]:
        """Each flat master with the optimizer's group that it belongs to."""
        groups = self._base_optimizer.param_groups
        if self._stage == 3:
            for index, flat in enumerate(self._zero.fp32_partitioned_groups_flat):
                yield groups[self._zero.sub_group_to_group_id[index]], flat
        else:
            yield from zip(groups, self._zero.single_partition_of_fp32_groups, strict=True)

    def _allocate_optimizer_state(self) -> None:
        """Make the optimizer create its moments, by a step that changes nothing: zero gradients, zero rate."""
        if self._base_optimizer.state:
            return
        groups = self._base_optimizer.param_groups
        saved = [(group["params"], group["lr"]) for group in groups]
        for own_group, flat in list(self._flat_masters()):
            for group in groups:
                group["params"] = [flat] if group is own_group else []
            own_group["lr"] = 0.0
            gradient, flat.grad = flat.grad, torch.zeros_like(flat)
            self._base_optimizer.step()
            flat.grad = gradient
        for group, (parameters, rate) in zip(groups, saved, strict=True):
            group["params"], group["lr"] = parameters, rate

    def _publish_masters(self) -> None:
        """Copy masters that were written from outside to the parameters that the forward pass uses."""
        if self._stage != 3:
            self._zero.update_lp_params()
            return
        # Parameters that a forward pass left gathered would not be gathered again.
        self._zero._partition_all_parameters()
        for index in range(len(self._zero.fp16_groups)):
            self._zero._reassign_or_swap_out_partitioned_parameters(index)
        persistent = self._zero.persistent_parameters
        if persistent:
            persistent[0].all_gather(persistent)


def _whole_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """A parameter's shape, also where ZeRO-3 has taken its memory away."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _autocast_forward(model: nn.Module, device: torch.device, dtype: torch.dtype | None) -> None:
    """Run the model's forward pass under autocast; from outside DeepSpeed would turn it off."""
    if dtype is None:
        return
    forward = model.forward

    def autocast_forward(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(device.type, dtype):
            return forward(*args, **kwargs)

    model.forward = autocast_forward


def _import_deepspeed() -> Any:
    """DeepSpeed without its chatter, and without an extension for inference that it would compile first."""
    # It warns where it has to find out by itself that there is no GPU.
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    import deepspeed
    from deepspeed.utils import logger

    # Its log speaks of every setting on every rank, and warns of each optimizer that is not its own.
    logger.setLevel(logging.ERROR)
    # It calls collectives by names that newer torch deprecates.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")
    # Built when communication starts on a CPU, used by inference alone; a build that was killed leaves a lock on which
    # every later run would wait.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # Until it knows of the process group, it takes itself for one rank.
    deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)
    return deepspeed
