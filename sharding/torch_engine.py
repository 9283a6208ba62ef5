"""What all strategies on torch share: the accumulation loop, agreed skipping, and canonical state."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from sharding.blocks import hidden_matrices
from sharding.engine import Batch, ModelDefinition, OptimizedParameter, OptimizerFactory
from sharding.gradient_noise import MicroBatchNorms
from sharding.loss_scaler import LossScaler
from sharding.mesh import DataParallelMesh
from sharding.reached import ReachedParameters
from sharding.replicas import Replicas
from sharding.state import TensorSlice, local_tensor, slice_of


class TorchEngine:
    """One process without communication (strategy ``none``), and the base of the strategies that communicate."""

    def __init__(
        self,
        definition: ModelDefinition,
        mesh: DataParallelMesh,
        device: torch.device,
        autocast_dtype: torch.dtype | None,
        build_optimizer: OptimizerFactory,
        loss_scaler: LossScaler | None = None,
    ) -> None:
        """Take a model whose parameters have memory and lie as the strategy wants them.

        Args:
            definition: the model and its functions.
            mesh: the ranks.
            device: where this rank computes.
            autocast_dtype: format of matrix products under autocast; None where parameters are cast or fp32 is used.
            build_optimizer: called once, with the parameters as they lie now.
            loss_scaler: for fp16; None elsewhere.
        """
        self._model = definition.model
        self._loss = definition.loss
        self._evaluation_sums = definition.evaluate
        self._mesh = mesh
        self._device = device
        self._autocast_dtype = autocast_dtype
        self._trainable = [
            _Trainable(name, parameter, self._local_parameter(parameter))
            for name, parameter in self._model.named_parameters()
            if parameter.requires_grad
        ]
        self._optimizer = build_optimizer(self._optimized_parameters())
        self._found_nonfinite = torch.zeros((), device=device)
        self._loss_scaler = loss_scaler
        self._has_whole_optimizer_state = False
        # Of strategies under which gradients travel.
        self._reached: ReachedParameters | None = None
        self._micro_batch_norms = MicroBatchNorms(self._model)

    @property
    def loss_scale(self) -> torch.Tensor | None:
        """See Engine."""
        return None if self._loss_scaler is None else self._loss_scaler.scale

    def train_batch(self, micro_batches: Sequence[Batch], denominator: int) -> torch.Tensor:
        """See Engine."""
        total = torch.zeros((), device=self._device)
        scale: float | torch.Tensor = self._gradient_scale() / max(denominator, 1)
        if self._loss_scaler is not None:
            scale = self._loss_scaler.scale * scale
        for index, batch in enumerate(micro_batches):
            with self._accumulation_context(is_last=index == len(micro_batches) - 1):
                with self._autocast():
                    loss_sum = self._loss(self._forward_module(), self._to_device(batch))
                # A rank-local infinite loss can leave its gradients finite. Turned into NaN here, it reaches every
                # rank through the gradient reduction, and all skip the step without another collective.
                factor = torch.where(loss_sum.detach().isfinite(), scale, torch.nan)
                self._backward(loss_sum * factor)
            total += loss_sum.detach()
        if self._reached is not None:
            self._reached.share()
        return total

    def train_batch_with_norms(
        self, micro_batches: Sequence[Batch], denominator: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See Engine."""
        with self._micro_batch_norms.recording():
            loss_sum = self.train_batch(micro_batches, denominator)
        scale = self._gradient_scale() * (1.0 if self._loss_scaler is None else self._loss_scaler.scale)
        return loss_sum, self._micro_batch_norms.squares() / scale**2

    def local_gradients(self) -> list[torch.Tensor]:
        """See Engine."""
        return [local_tensor(entry.parameter.grad) for entry in self._trainable if entry.parameter.grad is not None]

    def evaluate(self, batches: Iterable[Batch]) -> list[torch.Tensor]:
        """See Engine."""
        return [self._evaluate_batch(batch) for batch in batches]

    def clip_grad_norm(self, max_norm: float) -> torch.Tensor:
        """See Engine."""
        gradients = self.local_gradients()
        squares = _sum_of_squares(gradients) if gradients else torch.zeros((), device=self._device, dtype=torch.float64)
        norm = self._sum_over_shards(squares).sqrt().float()
        if self._loss_scaler is not None:
            norm = norm / self._loss_scaler.scale
        coefficient = None if max_norm == 0 else (max_norm / (norm + 1e-6)).clamp(max=1.0)
        if self._loss_scaler is not None:
            coefficient = (1.0 if coefficient is None else coefficient) / self._loss_scaler.scale
        if coefficient is not None and gradients:
            torch._foreach_mul_(gradients, coefficient)
        self._found_nonfinite = (~norm.isfinite()).float()
        return norm

    def step(self, learning_rate: float) -> torch.Tensor:
        """See Engine."""
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate * group.get("lr_scale", 1.0)
        self._give_gradients_to_optimizer()
        # The fused kernels read this flag on the device and leave everything alone where it is 1: no host sync.
        self._optimizer.found_inf = self._found_nonfinite  # type: ignore[attr-defined]
        with _gradients_replaced(dict.fromkeys(self._unreached_parameters())):
            self._apply_optimizer()
        if self._loss_scaler is not None:
            self._loss_scaler.update(self._found_nonfinite)
        self.drop_gradients()
        return 1.0 - self._found_nonfinite

    def settle(self) -> None:
        """See Engine; the exchange of what was reached."""
        if self._reached is not None:
            self._reached.wait()

    def drop_gradients(self) -> None:
        """See Engine."""
        for entry in self._trainable:
            entry.parameter.grad = entry.local.grad = None

    def state(self, *, with_optimizer: bool) -> list[TensorSlice]:
        """See Engine."""
        slices = self._model_slices()
        if with_optimizer:
            self._allocate_optimizer_state()
            slices += self._optimizer_slices({part.name: part for part in slices})
            if self._loss_scaler is not None:
                slices += self._loss_scaler.slices(is_written_here=self._mesh.writes_copy())
        return slices

    def load_state(self, read: Callable[[TensorSlice], None], *, with_optimizer: bool) -> None:
        """See Engine."""
        for part in self.state(with_optimizer=with_optimizer):
            read(part)

    def named_local_shards(self) -> dict[str, torch.Tensor]:
        """See Engine."""
        return {name: local_tensor(parameter.detach()) for name, parameter in self.named_parameters()}

    def replicas(self) -> Replicas | None:
        """See Engine."""
        return None

    def named_parameters(self) -> list[tuple[str, Any]]:
        """See Engine."""
        return list(self._model.named_parameters())

    def _evaluate_batch(self, batch: Batch) -> torch.Tensor:
        self._model.eval()
        with torch.no_grad(), self._autocast():
            sums = self._evaluation_sums(self._model, self._to_device(batch))
        self._model.train()
        return sums

    def _forward_module(self) -> nn.Module:
        return self._model

    def _backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def _apply_optimizer(self) -> None:
        self._optimizer.step()

    def _local_parameter(self, parameter: nn.Parameter) -> nn.Parameter:
        """A parameter as the optimizer gets it; called once for each, before there is an optimizer."""
        return _local_parameter(parameter)

    def _give_gradients_to_optimizer(self) -> None:
        for entry in self._trainable:
            if entry.local is not entry.parameter and entry.parameter.grad is not None:
                entry.local.grad = local_tensor(entry.parameter.grad)

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

    def _sum_over_shards(self, squares: torch.Tensor) -> torch.Tensor:
        return squares

    def _autocast(self) -> AbstractContextManager[Any]:
        if self._autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self._device.type, self._autocast_dtype)

    def _to_device(self, batch: Batch) -> Batch:
        return {name: tensor.to(self._device, non_blocking=True) for name, tensor in batch.items()}

    def _model_slices(self) -> list[TensorSlice]:
        persistent = set(self._model.state_dict().keys())
        tensors: list[tuple[str, torch.Tensor]] = self.named_parameters()
        tensors += [(name, buffer) for name, buffer in self._model.named_buffers() if name in persistent]
        return [self._slice(f"model/{name}", tensor, index) for index, (name, tensor) in enumerate(tensors)]

    def _optimized_parameters(self) -> list[OptimizedParameter]:
        hidden = hidden_matrices(self._model)
        parameters = []
        for entry in self._trainable:
            whole = slice_of(entry.name, entry.parameter, is_written_here=False)
            parameters.append(
                OptimizedParameter(
                    name=entry.name,
                    tensor=entry.local,
                    global_shape=whole.global_shape,
                    first_row=whole.offsets[0] if whole.offsets else 0,
                    shard_group=self._mesh.shard_group if isinstance(entry.parameter, DTensor) else None,
                    is_hidden_matrix=entry.name in hidden,
                )
            )
        return parameters

    def _optimizer_slices(self, model_slices: Mapping[str, TensorSlice]) -> list[TensorSlice]:
        slices = []
        holds_whole = getattr(self._optimizer, "holds_whole", None)
        for entry in self._trainable:
            whole = model_slices[f"model/{entry.name}"]
            for key, value in sorted(self._optimizer.state.get(entry.local, {}).items()):
                name = f"optimizer/{entry.name}/{key}"
                if value is None:
                    continue
                if value.ndim == 0 or (holds_whole is not None and holds_whole(entry.local, key)):
                    # A count of steps, for example: the same on every rank.
                    slices.append(slice_of(name, value, is_written_here=self._mesh.writes_copy()))
                else:
                    shape = (whole.global_shape[0], *value.shape[1:])
                    offsets = (whole.offsets[0], *(0 for _ in value.shape[1:]))
                    slices.append(replace(whole, name=name, tensor=value, global_shape=shape, offsets=offsets))
        return slices

    def _slice(self, name: str, tensor: torch.Tensor, index: int) -> TensorSlice:
        if isinstance(tensor, DTensor):
            return slice_of(name, tensor, is_written_here=self._mesh.is_first_replica)
        return slice_of(name, tensor, is_written_here=self._mesh.writes_copy(index))

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
            self._optimizer.found_inf = torch.ones((), device=self._device)  # type: ignore[attr-defined]
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


def _sum_of_squares(gradients: list[torch.Tensor]) -> torch.Tensor:
    """Sum of the squares of all elements, an fp64 scalar.

    A CPU that adds up millions of fp32 squares one after the other loses the fourth digit, which would make the clipped
    step depend on how the gradients are divided. Rows are short enough for fp32, and their norms are added up in fp64.
    """
    if gradients[0].device.type != "cpu":
        return torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float64)).square().sum()
    row_norms = [torch.linalg.vector_norm(gradient, dim=-1).reshape(-1) for gradient in gradients]
    return torch.cat(row_norms).double().square().sum()


def sum_over(group: dist.ProcessGroup | None, value: torch.Tensor) -> torch.Tensor:
    """Sum a tensor over the ranks of a group, in place."""
    dist.all_reduce(value, group=group)
    return value


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
