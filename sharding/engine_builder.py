"""How an engine comes about: what ``build_engine`` asks of every backend and strategy, and gives to it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sharding.config import ParallelConfig
from sharding.engine import Engine, ModelDefinition, OptimizerFactory
from sharding.loss_scaler import LossScaler
from sharding.mesh import ParallelMesh


@dataclass(frozen=True)
class EngineParts:
    """What an engine is built of.

    Attributes:
        definition: the model and its functions.
        blocks: the model's blocks, with their names, in forward order.
        mesh: the ranks.
        device: where this rank computes.
        dtype: format of parameters and activations in computing.
        build_optimizer: called once, when parameters lie where they stay.
        parallel: strategy and backend.
        loss_scaler: for fp16; None elsewhere.
        deepspeed_settings: DeepSpeed's configuration; empty under other backends.
    """

    definition: ModelDefinition
    blocks: Sequence[tuple[str, nn.Module]]
    mesh: ParallelMesh
    device: torch.device
    dtype: torch.dtype
    build_optimizer: OptimizerFactory
    parallel: ParallelConfig
    loss_scaler: LossScaler | None
    deepspeed_settings: dict[str, Any]

    @property
    def copies_dtype(self) -> torch.dtype | None:
        """Format of the copies of parameters that a model computes with; None for fp32."""
        return None if self.dtype is torch.float32 else self.dtype


class EngineBuilder(ABC):
    """Lays a model on ranks as one backend and strategy want it; made when no parameter has memory yet."""

    def __init__(self, parts: EngineParts) -> None:
        """Bind to the parts."""
        self._parts = parts

    def prepare_block(self, name: str, block: nn.Module) -> None:  # noqa: B027 - most builders leave it as it is
        """Take the model's next block, in forward order; it stays as it is unless a builder says otherwise.

        It is whole, with memory and initial values, recomputation and compilation set up; what this rank does not keep
        should be freed now, before the next block has memory.
        """

    @abstractmethod
    def finish(self, model: nn.Module) -> Engine:
        """Take the model, whose every block was prepared and all else has initial values, and put an engine around it.

        Raises:
            UserError: the backend cannot carry the model.
        """


class WholeModelBuilder(EngineBuilder):
    """Builds an engine with all of the model on every rank."""

    def __init__(self, engine: Callable[..., Engine], parts: EngineParts) -> None:
        """Bind to an engine's class, which is called as ``TorchEngine`` is, and to its parts."""
        super().__init__(parts)
        self._engine = engine

    def finish(self, model: nn.Module) -> Engine:
        """See EngineBuilder."""
        parts = self._parts
        return self._engine(
            parts.definition, parts.mesh, parts.device, parts.copies_dtype, parts.build_optimizer, parts.loss_scaler
        )
