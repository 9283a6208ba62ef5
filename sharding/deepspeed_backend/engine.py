"""DeepSpeed's ZeRO stages 1 to 3 behind the Engine protocol, with canonical state."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from sharding.compute_copies import ComputeCopies
from sharding.deepspeed_backend.files import in_memory, refuse_frozen_files
from sharding.deepspeed_backend.gathered_copies import GatheredCopies
from sharding.deepspeed_backend.library import import_deepspeed, linear_of_deepspeed, linear_of_torch
from sharding.deepspeed_backend.untouched_runs import UntouchedRuns
from sharding.engine import Batch, ModelDefinition, OptimizerFactory
from sharding.loss_scaler import LossScaler
from sharding.mesh import ParallelMesh
from sharding.micro_batches import accumulate_gradients, on_device
from sharding.part import Part, part_of, part_of_run, whole_box
from sharding.ranks.errors import UserError
from sharding.reached import ReachedParameters
from sharding.state import MODEL_PREFIX


class DeepSpeedEngine:
    """A model in DeepSpeed's hands.

    DeepSpeed holds fp32 parameters, reduces, clips and steps; it finds a non-finite norm by itself and skips on all
    ranks. In 16 bits the model computes with copies of those, as elsewhere, since DeepSpeed's own 16-bit modes round
    initial values and buffers as well.
    """

    def __init__(
        self,
        definition: ModelDefinition,
        mesh: ParallelMesh,
        device: torch.device,
        copies_dtype: torch.dtype | None,
        build_optimizer: OptimizerFactory,
        settings: dict[str, Any],
        loss_scaler: LossScaler | None = None,
    ) -> None:
        """Hand the model over; the process group must be up.

        Args:
            definition: the model, whole (stages 1 and 2) or partitioned block by block (stage 3), and its functions.
            mesh: the ranks.
            device: where this rank computes.
            copies_dtype: format of the copies of parameters that the model computes with; None for fp32.
            build_optimizer: called once, before DeepSpeed cuts the parameters: with an elementwise optimizer.
            settings: DeepSpeed's configuration.
            loss_scaler: for fp16; None elsewhere.

        Raises:
            UserError: the model has frozen parameters, and parameters are kept in files.
        """
        deepspeed = import_deepspeed(settings)
        refuse_frozen_files(settings, definition.model)
        self._definition = definition
        self._mesh = mesh
        self._device = device
        self._loss_scaler = loss_scaler
        trainable = [(name, p) for name, p in definition.model.named_parameters() if p.requires_grad]
        # Whole, though what is partitioned has no elements here: the optimizer is elementwise.
        parameters = [
            Part(name, p, shape := _whole_shape(p), (whole_box(shape),), mesh.copy_holder) for name, p in trainable
        ]
        with linear_of_torch():
            self._module, *_ = deepspeed.initialize(
                model=definition.model, optimizer=build_optimizer(parameters), config=settings, dist_init_required=False
            )
        self._zero = self._module.optimizer
        self._stage = self._module.zero_optimization_stage()
        if self._stage != settings["zero_optimization"]["stage"]:
            raise RuntimeError(f"DeepSpeed trains with stage {self._stage}, not as configured: {settings}")
        self._copies = self._copies_in(copies_dtype)
        self._trainable = trainable
        self._members = self._members_of_flat_partitions()
        self._has_allocated = False
        self._reached = ReachedParameters([p for _, p in trainable], mesh.reduction_group, must_be_alike=True)
        self._untouched = UntouchedRuns(self._base_optimizer)

    @property
    def loss_scale(self) -> torch.Tensor | None:
        """See Engine."""
        return None if self._loss_scaler is None else self._loss_scaler.scale

    def train_batch(self, micro_batches: Sequence[Batch], denominator: int) -> torch.Tensor:
        """See Engine."""
        # DeepSpeed averages over ranks; the loss is a global sum over a global count.
        scale = self._mesh.reduction.degree / max(denominator, 1)
        if self._loss_scaler is not None:
            # DeepSpeed scales by a number of the host's; its step waits for the device in any case.
            self._zero.override_loss_scale(float(self._loss_scaler.scale))
        with self._computing(has_gradients=True):
            total = accumulate_gradients(
                micro_batches,
                scale,
                self._device,
                loss=lambda batch: self._definition.loss(self._module, batch),
                backward=lambda loss: self._module.backward(loss, scale_wrt_gas=False),
                context=self._accumulation_context,
            )
        self._reached.end_step()
        self._reached.exchange()
        return total

    def train_batch_with_norms(
        self, micro_batches: Sequence[Batch], denominator: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See Engine."""
        raise UserError(
            "parallel.backend=deepspeed does not show each micro-batch's own gradient; use parallel.backend=torch."
        )

    def named_local_gradients(self) -> dict[str, torch.Tensor]:
        """See Engine."""
        return {}

    def evaluate(self, batches: Iterable[Batch]) -> list[torch.Tensor]:
        """See Engine."""
        with self._computing(has_gradients=False):
            return [self._evaluate_batch(batch) for batch in batches]

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
        unreached = {self._trainable[index][0] for index in self._reached.unreached()}
        runs = {
            id(master): [self._run(parameter)[:2] for name, parameter in members if name in unreached]
            for master, members in zip(self._masters, self._members, strict=True)
        }
        with self._untouched.during_step(runs):
            self._module.step()
        skipped = torch.tensor(float(bool(self._zero.overflow)), device=self._device)
        if self._loss_scaler is not None:
            self._loss_scaler.update(skipped)
        return 1.0 - skipped

    def settle(self) -> None:
        """See Engine; the exchange of what was reached."""
        self._reached.wait()

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

    def state(self, *, with_optimizer: bool) -> list[Part]:
        """See Engine; a rank's part of a flat partition becomes boxes of each tensor.

        What is kept in files is copied to memory, all of it at once.
        """
        if with_optimizer:
            # Where every step so far was skipped, there is none yet.
            self._allocate_optimizer_state()
        parts = self._replicated_parts()
        for group in range(len(self._members)):
            with self._in_memory(group, changes=False) as is_borrowed:
                own = self._parts_of_partition(group, with_optimizer=with_optimizer)
                parts += [replace(part, tensor=part.tensor.clone()) for part in own] if is_borrowed else own
        if with_optimizer and self._loss_scaler is not None:
            parts += self._loss_scaler.parts(self._mesh.scalar_holder)
        return parts

    def load_state(self, read: Callable[[Part], None], *, with_optimizer: bool) -> None:
        """See Engine."""
        if with_optimizer:
            self._allocate_optimizer_state()
        if self._stage == 3:
            # Parameters that a forward pass left gathered would not be gathered again.
            self._zero._partition_all_parameters()
        for part in self._replicated_parts():
            read(part)
        for group in range(len(self._members)):
            with self._in_memory(group, changes=True):
                self._read_partition(group, read, with_optimizer=with_optimizer)
                if self._stage == 3:
                    self._zero._reassign_or_swap_out_partitioned_parameters(group)
        if with_optimizer and self._loss_scaler is not None:
            for part in self._loss_scaler.parts(self._mesh.scalar_holder):
                read(part)
        self._publish_masters()

    def named_local_shards(self) -> dict[str, torch.Tensor]:
        """See Engine; a flat run of the parameter's elements."""
        shards = {}
        for master, members in zip(self._masters, self._members, strict=True):
            for name, parameter in members:
                offset, size, _ = self._run(parameter)
                shards[name] = master.detach()[offset : offset + size]
        return shards

    def replicas(self) -> list[Part]:
        """See Engine; under stages 1 and 2 every rank computes with all parameters, gathered after each step."""
        if self._stage == 3:
            return []
        return [part_of(name, parameter, self._mesh.copy_holder) for name, parameter in self.named_parameters()]

    def named_parameters(self) -> list[tuple[str, Any]]:
        """See Engine."""
        if isinstance(self._copies, ComputeCopies):
            return self._copies.named_masters()
        return list(self._definition.model.named_parameters())

    def _copies_in(self, dtype: torch.dtype | None) -> ComputeCopies | GatheredCopies | None:
        if dtype is None:
            return None
        # In stage 3 nothing is whole until a module is called.
        return (GatheredCopies if self._stage == 3 else ComputeCopies)(self._definition.model, dtype)

    def _computing(self, *, has_gradients: bool) -> AbstractContextManager[None]:
        """Have the model hold the parameters that it computes with."""
        if self._copies is not None:
            # Copies are kept by torch's linear layers as by DeepSpeed's, which round before they add the bias.
            return self._copies.in_place(has_gradients=has_gradients)
        return linear_of_deepspeed() if self._stage == 3 else nullcontext()

    def _evaluate_batch(self, batch: Batch) -> torch.Tensor:
        self._module.eval()
        with torch.no_grad():
            sums = self._definition.evaluate(self._module, on_device(batch, self._device))
        self._module.train()
        return sums

    @property
    def _base_optimizer(self) -> torch.optim.Optimizer:
        return self._zero.optimizer

    def _accumulation_context(self, is_last: bool) -> AbstractContextManager[Any]:
        self._module.set_gradient_accumulation_boundary(is_last)
        return nullcontext()

    def _norm(self) -> torch.Tensor:
        if self._stage == 3:
            from deepspeed.runtime.zero.stage3 import combine_grad_norm_groups

            norm = combine_grad_norm_groups(self._zero._get_norm_groups())
        else:
            norm = self._zero.scaled_global_norm()
        norm = torch.as_tensor(norm, device=self._device).float()
        # DeepSpeed's word for a norm that is not finite is -1.
        return torch.where(norm < 0, torch.inf, norm)

    def _members_of_flat_partitions(self) -> list[list[tuple[str, Any]]]:
        """Names and parameters by the flat partition that holds this rank's part of them."""
        members: list[list[tuple[str, Any]]] = [[] for _ in self._masters]
        if self._stage == 3:
            for name, parameter in self._trainable:
                members[self._zero.grad_position[self._zero.get_param_id(parameter)][0]].append((name, parameter))
            return members
        group_of = {id(p): index for index, group in enumerate(self._zero.bit16_groups) for p in group}
        for name, parameter in self._trainable:
            members[group_of[id(parameter)]].append((name, parameter))
        return members

    def _in_memory(self, group: int, *, changes: bool) -> AbstractContextManager[bool]:
        return in_memory(self._zero, group, changes=changes) if self._stage == 3 else nullcontext(enter_result=False)

    def _parts_of_partition(self, group: int, *, with_optimizer: bool) -> list[Part]:
        master = self._masters[group]
        moments = self._base_optimizer.state.get(master, {}) if with_optimizer else {}
        parts = []
        for name, parameter in self._members[group]:
            offset, size, start = self._run(parameter)
            tensors = {f"{MODEL_PREFIX}{name}": master.detach()}
            tensors |= {f"optimizer/{name}/{key}": v for key, v in sorted(moments.items()) if v is not None}
            for tensor_name, tensor in tensors.items():
                if tensor.ndim:
                    run, shape = tensor[offset : offset + size], _whole_shape(parameter)
                    parts.append(part_of_run(tensor_name, run, shape, start, self._mesh.shard_group))
                else:
                    # A count of steps: one for each flat partition, the same on every rank.
                    parts.append(part_of(tensor_name, tensor, self._mesh.copy_holder))
        return parts

    def _read_partition(self, group: int, read: Callable[[Part], None], *, with_optimizer: bool) -> None:
        state = self._base_optimizer.state.get(self._masters[group], {}) if with_optimizer else {}
        # One for all parameters of the partition, some of which may have had fewer gradients than others.
        counts = [value.zero_() for value in state.values() if value is not None and not value.ndim]
        largest = [count.clone() for count in counts]
        for part in self._parts_of_partition(group, with_optimizer=with_optimizer):
            read(part)
            largest = [torch.maximum(one, count) for one, count in zip(largest, counts, strict=True)]
        for count, value in zip(counts, largest, strict=True):
            count.copy_(value)

    def _replicated_parts(self) -> list[Part]:
        model = self._definition.model
        persistent = set(model.state_dict().keys())
        copied: list[tuple[str, Any]] = [(name, buffer) for name, buffer in model.named_buffers() if name in persistent]
        frozen: list[tuple[str, Any]] = [(name, p) for name, p in self.named_parameters() if not p.requires_grad]
        if self._stage != 3:
            copied, frozen = copied + frozen, []
        parts = [
            part_of(f"{MODEL_PREFIX}{name}", tensor, self._mesh.copy_holder, index)
            for index, (name, tensor) in enumerate(copied)
        ]
        for name, parameter in frozen:
            # Frozen or not, stage 3 divides it: each rank holds a run of it, and the last ones less or nothing.
            partition = parameter.ds_tensor.ds_numel
            start = self._mesh.sharding.rank * partition
            run = parameter.ds_tensor[: max(0, min(partition, parameter.ds_numel - start))]
            parts.append(
                part_of_run(f"{MODEL_PREFIX}{name}", run, _whole_shape(parameter), start, self._mesh.shard_group)
            )
        return parts

    def _run(self, parameter: Any) -> tuple[int, int, int]:
        """This rank's run of a parameter: its offset and size in the flat partition, and its start in the parameter."""
        if self._stage == 3:
            _, offset, _ = self._zero.grad_position[self._zero.get_param_id(parameter)]
            partition = parameter.ds_tensor.ds_numel
            start = self._mesh.sharding.rank * partition
            return offset, max(0, min(partition, parameter.ds_numel - start)), start
        mapping = parameter._hp_mapping
        if mapping is None:
            return 0, 0, 0
        address = mapping.hp_fragment_address
        return address.start, address.numel, mapping.lp_fragment_address.start

    @property
    def _masters(self) -> list[torch.Tensor]:
        """The flat partitions of fp32 masters."""
        return (
            self._zero.fp32_partitioned_groups_flat if self._stage == 3 else self._zero.single_partition_of_fp32_groups
        )

    def _optimizer_group(self, partition: int) -> dict[str, Any]:
        """The optimizer's group that a flat partition belongs to."""
        index = self._zero.sub_group_to_group_id[partition] if self._stage == 3 else partition
        return self._base_optimizer.param_groups[index]

    def _allocate_optimizer_state(self) -> None:
        """Make the optimizer create its moments, as they are before the first step, unless it has some.

        A step with zero gradients and zero rate changes no parameter; what it counts is taken back.
        """
        if self._base_optimizer.state or self._has_allocated:
            return
        # Plain SGD has none after that either.
        self._has_allocated = True
        groups = self._base_optimizer.param_groups
        saved = [(group["params"], group["lr"]) for group in groups]
        for index, flat in enumerate(self._masters):
            own_group = self._optimizer_group(index)
            for group in groups:
                group["params"] = [flat] if group is own_group else []
            own_group["lr"] = 0.0
            with self._in_memory(index, changes=True):
                gradient, flat.grad = flat.grad, torch.zeros_like(flat)
                self._base_optimizer.step()
                flat.grad = gradient
                for value in self._base_optimizer.state[flat].values():
                    if value is not None:
                        value.zero_()
        for group, (parameters, rate) in zip(groups, saved, strict=True):
            group["params"], group["lr"] = parameters, rate

    def _publish_masters(self) -> None:
        """Copy masters that were written from outside to the whole parameters that the forward pass uses."""
        if self._stage != 3:
            self._zero.update_lp_params()
        elif persistent := self._zero.persistent_parameters:
            persistent[0].all_gather(persistent)


def _whole_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """A parameter's shape, also where ZeRO-3 has taken its memory away."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))
