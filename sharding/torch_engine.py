"""What all strategies on torch share: the accumulation loop, agreed skipping, and canonical state."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from sharding.compute_copies import ComputeCopies
from sharding.engine import Batch, ModelDefinition, OptimizerFactory
from sharding.gradient_noise import MicroBatchNorms
from sharding.gradient_norm import square_sum
from sharding.loss_scaler import LossScaler
from sharding.mesh import ParallelMesh
from sharding.micro_batches import accumulate_gradients, on_device
from sharding.part import Part, local_tensor, part_of
from sharding.reached import ReachedParameters
from sharding.state import MODEL_PREFIX


class TorchEngine:
    """One process without communication (strategy ``none``), and the base of the strategies that communicate."""

    def __init__(
        self,
        definition: ModelDefinition,
        mesh: ParallelMesh,
        device: torch.device,
        copies_dtype: torch.dtype | None,
        build_optimizer: OptimizerFactory,
        loss_scaler: LossScaler | None = None,
    ) -> None:
        """Take a model whose parameters have memory and lie as the strategy wants them.

        Args:
            definition: the model and its functions.
            mesh: the ranks.
            device: where this rank computes.
            copies_dtype: format of the copies of parameters that the model computes with; None where the strategy has
                them in their format, or it is fp32.
            build_optimizer: called once, with the parameters as they lie now.
            loss_scaler: for fp16; None elsewhere.
        """
        self._model = definition.model
        self._loss = definition.loss
        self._evaluation_sums = definition.evaluate
        self._mesh = mesh
        self._device = device
        self._copies = None if copies_dtype is None else ComputeCopies(self._model, copies_dtype)
        self._trainable = [
            _Trainable(name, parameter, self._local_parameter(parameter))
            for name, parameter in self._model.named_parameters()
            if parameter.requires_grad
        ]
        self._optimized = self._optimized_parts()
        self._optimizer = build_optimizer(self._optimized)
        self._loss_scaler = loss_scaler
        # What gradients in memory are to be divided by, on the device; None where they are as the optimizer wants them.
        self._divisor: torch.Tensor | None = None
        # 1.0 where the norm of the present gradients is not finite, else 0.0; None as long as nobody has asked for it.
        self._found_nonfinite: torch.Tensor | None = None
        self._has_whole_optimizer_state = False
        # Of strategies under which gradients travel.
        self._reached: ReachedParameters | None = None
        # On a GPU a collective of the host's costs the device nothing, and a rank that missed something would have to
        # wait for the device to hear of it with the norm. Else all those ranks come to the norm's, as a rule.
        groups = {part.sums_over for part in self._optimized} - {None}
        has_all = mesh.reduction_group in groups and not mesh.dims.divides_model
        self._norm_tells_reached = device.type == "cpu" and has_all
        self._micro_batch_norms = MicroBatchNorms(self._model)

    @property
    def loss_scale(self) -> torch.Tensor | None:
        """See Engine."""
        return None if self._loss_scaler is None else self._loss_scaler.scale

    def train_batch(self, micro_batches: Sequence[Batch], denominator: int) -> torch.Tensor:
        """See Engine."""
        scale: float | torch.Tensor = self._gradient_scale() / max(denominator, 1)
        self._found_nonfinite = self._divisor = None
        if self._loss_scaler is not None:
            scale = self._loss_scaler.scale * scale
            self._divisor = self._loss_scaler.scale
        with self._computing(has_gradients=True):
            total = accumulate_gradients(
                micro_batches,
                scale,
                self._device,
                loss=self._training_loss,
                backward=self._backward,
                context=lambda is_last: self._accumulation_context(is_last=is_last),
            )
        if self._reached is not None:
            self._reached.end_step()
            self._tell_reached(self._reached)
        return total if self._mesh.counts_loss else torch.zeros_like(total)

    def train_batch_with_norms(
        self, micro_batches: Sequence[Batch], denominator: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See Engine."""
        with self._micro_batch_norms.recording():
            loss_sum = self.train_batch(micro_batches, denominator)
        scale = self._gradient_scale() * (1.0 if self._loss_scaler is None else self._loss_scaler.scale)
        return loss_sum, self._micro_batch_norms.squares() / scale**2

    def named_local_gradients(self) -> dict[str, torch.Tensor]:
        """See Engine."""
        self._divide_gradients()
        return {part.name: gradient for part, gradient in self._gradient_pieces()}

    def evaluate(self, batches: Iterable[Batch]) -> list[torch.Tensor]:
        """See Engine."""
        with self._computing(has_gradients=False):
            return [self._evaluate_batch(batch) for batch in batches]

    def clip_grad_norm(self, max_norm: float) -> torch.Tensor:
        """See Engine."""
        flags = self._reached.flags() if self._reached is not None and self._norm_tells_reached else None
        squares = square_sum(
            self._gradient_pieces(), self._optimized, self._mesh.dims, self._device, flags, self._mesh.reduction_group
        )
        if self._reached is not None and flags is not None:
            self._reached.hear(flags)
        norm = squares.sqrt().float()
        if self._divisor is not None:
            norm = norm / self._divisor
        if max_norm != 0:
            clipping = ((norm + 1e-6) / max_norm).clamp(min=1.0)
            self._divisor = clipping if self._divisor is None else self._divisor * clipping
        self._found_nonfinite = (~norm.isfinite()).float()
        return norm

    def step(self, learning_rate: float) -> torch.Tensor:
        """See Engine."""
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate * group.get("lr_scale", 1.0)
        if self._found_nonfinite is None:
            # A verdict of an earlier step says nothing about these gradients.
            self.clip_grad_norm(0.0)
        found_nonfinite = self._found_nonfinite
        assert found_nonfinite is not None
        if not getattr(self._optimizer, "_step_supports_amp_scaling", False):
            self._divide_gradients()
        self._give_gradients_to_optimizer()
        with _gradients_replaced(dict.fromkeys(self._unreached_parameters())):
            self._tell_optimizer(self._divisor, found_nonfinite)
            self._apply_optimizer()
            self._tell_optimizer(None, found_nonfinite)
        if self._loss_scaler is not None:
            self._loss_scaler.update(found_nonfinite)
        self.drop_gradients()
        self._found_nonfinite = self._divisor = None
        return 1.0 - found_nonfinite

    def settle(self) -> None:
        """See Engine; the exchange of what was reached."""
        if self._reached is not None:
            self._reached.wait()

    def drop_gradients(self) -> None:
        """See Engine."""
        for entry in self._trainable:
            entry.parameter.grad = entry.local.grad = None

    def state(self, *, with_optimizer: bool) -> list[Part]:
        """See Engine."""
        parts = self._model_parts()
        if with_optimizer:
            self._allocate_optimizer_state()
            parts += self._optimizer_parts({part.name: part for part in parts})
            if self._loss_scaler is not None:
                parts += self._loss_scaler.parts(self._mesh.scalar_holder)
        return parts

    def load_state(self, read: Callable[[Part], None], *, with_optimizer: bool) -> None:
        """See Engine."""
        for part in self.state(with_optimizer=with_optimizer):
            read(part)

    def named_local_shards(self) -> dict[str, torch.Tensor]:
        """See Engine."""
        return {name: local_tensor(parameter.detach()) for name, parameter in self.named_parameters()}

    def replicas(self) -> list[Part]:
        """See Engine."""
        return []

    def named_parameters(self) -> list[tuple[str, Any]]:
        """See Engine."""
        return list(self._model.named_parameters()) if self._copies is None else self._copies.named_masters()

    def _evaluate_batch(self, batch: Batch) -> torch.Tensor:
        self._model.eval()
        with torch.no_grad():
            sums = self._evaluation_sums(self._model, on_device(batch, self._device))
        self._model.train()
        return sums if self._mesh.counts_loss else torch.zeros_like(sums)

    def _training_loss(self, batch: Batch) -> torch.Tensor:
        return self._loss(self._forward_module(), batch)

    def _forward_module(self) -> nn.Module:
        return self._model

    def _backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def _divide_gradients(self) -> None:
        """Make gradients in memory what the optimizer is to get; a pass over them that it otherwise spares."""
        gradients = [gradient for _, gradient in self._gradient_pieces()]
        if self._divisor is not None and gradients:
            torch._foreach_div_(gradients, self._divisor)
        self._divisor = None

    def _tell_optimizer(self, divisor: torch.Tensor | None, found_nonfinite: torch.Tensor) -> None:
        # The fused kernels read both on the device, the flag to leave everything alone where it is 1: no host sync.
        self._optimizer.grad_scale = divisor  # type: ignore[attr-defined]
        self._optimizer.found_inf = found_nonfinite  # type: ignore[attr-defined]

    def _apply_optimizer(self) -> None:
        self._optimizer.step()

    def _local_parameter(self, parameter: nn.Parameter) -> nn.Parameter:
        """A parameter as the optimizer gets it; called once for each, before there is an optimizer."""
        return _local_parameter(parameter)

    def _give_gradients_to_optimizer(self) -> None:
        for entry in self._trainable:
            if entry.local is not entry.parameter and entry.parameter.grad is not None:
                entry.local.grad = local_tensor(entry.parameter.grad)

    def _tell_reached(self, reached: ReachedParameters) -> None:
        """After a step's last backward pass: tell other ranks what this one reached, if the norm does not."""
        if not self._norm_tells_reached:
            reached.exchange()

    def _unreached_parameters(self) -> list[nn.Parameter]:
        """Local parameters that may have a gradient of zeros, though no rank's backward pass has come to them."""
        if self._reached is None:
            return []
        return [self._trainable[index].local for index in self._reached.unreached()]

    def _gradient_scale(self) -> float:
        """Factor that turns the strategy's gradient reduction into a sum over ranks."""
        return 1.0

    def _accumulation_context(self, *, is_last: bool) -> AbstractContextManager[Any]:
        return nullcontext()

    def _computing(self, *, has_gradients: bool) -> AbstractContextManager[None]:
        """Have the model hold the parameters that it computes with."""
        return nullcontext() if self._copies is None else self._copies.in_place(has_gradients=has_gradients)

    def _gradient_pieces(self) -> list[tuple[Part, torch.Tensor]]:
        """This rank's gradients, each beside the part of the parameter that it belongs to."""
        pairs = zip(self._optimized, self._trainable, strict=True)
        return [(part, local_tensor(entry.parameter.grad)) for part, entry in pairs if entry.parameter.grad is not None]

    def _model_parts(self) -> list[Part]:
        persistent = set(self._model.state_dict().keys())
        tensors: list[tuple[str, torch.Tensor]] = self.named_parameters()
        tensors += [(name, buffer) for name, buffer in self._model.named_buffers() if name in persistent]
        return [self._part(f"{MODEL_PREFIX}{name}", tensor, index) for index, (name, tensor) in enumerate(tensors)]

    def _optimized_parts(self) -> list[Part]:
        """A part of each trained parameter as the optimizer gets it; called once, before there is one."""
        return [replace(self._part(entry.name, entry.parameter), tensor=entry.local) for entry in self._trainable]

    def _optimizer_parts(self, model_parts: Mapping[str, Part]) -> list[Part]:
        parts = []
        holds_whole = getattr(self._optimizer, "holds_whole", None)
        for entry in self._trainable:
            for key, value in sorted(self._optimizer.state.get(entry.local, {}).items()):
                name = f"optimizer/{entry.name}/{key}"
                if value is None:
                    continue
                if value.ndim == 0 or (holds_whole is not None and holds_whole(entry.local, key)):
                    # A count of steps, for example: the same on every rank, also for a part without elements.
                    parts.append(part_of(name, value, self._mesh.copy_holder))
                else:
                    parts.append(model_parts[f"{MODEL_PREFIX}{entry.name}"].beside(name, value))
        return parts

    def _part(self, name: str, tensor: torch.Tensor, index: int = 0) -> Part:
        """The part of a tensor of the model that this rank holds; ``index`` deals out who writes copies."""
        if isinstance(tensor, DTensor):
            return part_of(name, tensor, self._mesh.shard_holder, sums_over=self._mesh.shard_group)
        return part_of(name, tensor, self._mesh.copy_holder, index)

    def _allocate_optimizer_state(self) -> None:
        """Make the optimizer create what state is missing, as it is before the first gradient, by a skipped step.

        Before the first step there is none; after it, that of parameters which have not had a gradient yet.
        """
        if self._has_whole_optimizer_state:
            return
        self._has_whole_optimizer_state = True
        gradients = {
            entry.local: None if self._optimizer.state.get(entry.local) else torch.zeros_like(entry.local)
            for entry in self._trainable
        }
        if any(gradient is not None for gradient in gradients.values()):
            self._tell_optimizer(None, torch.ones((), device=self._device))
            with _gradients_replaced(gradients):
                self._optimizer.step()


@contextmanager
def _gradients_replaced(gradients: Mapping[nn.Parameter, torch.Tensor | None]) -> Iterator[None]:
    """Give parameters other gradients, or none, for a while."""
    replaced = [(parameter, parameter.grad) for parameter in gradients]
    for parameter, gradient in gradients.items():
        parameter.grad = gradient
    try:
        yield
    finally:
        for parameter, gradient in replaced:
            parameter.grad = gradient


@dataclass(frozen=True)
class _Trainable:
    """A parameter as the strategy holds it, and as the optimizer sees it: plain memory of this rank."""

    name: str
    parameter: nn.Parameter
    local: nn.Parameter


def _local_parameter(parameter: nn.Parameter) -> nn.Parameter:
    """A parameter's local memory as a plain parameter: elementwise optimizers need no DTensor dispatch."""
    if not isinstance(parameter, DTensor):
        return parameter
    return nn.Parameter(local_tensor(parameter.detach()))
