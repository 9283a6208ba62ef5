"""From a model's blocks to the bucketed engine."""

from torch import nn

from sharding.bucketed.engine import BucketedEngine
from sharding.bucketed.model_buckets import ModelFlattening
from sharding.engine import Engine
from sharding.engine_builder import EngineBuilder, EngineParts
from sharding.memory_formula import bucket_elements


class BucketedBuilder(EngineBuilder):
    """Builds zero1 and zero2: the model goes into buckets as a whole."""

    def __init__(self, parts: EngineParts) -> None:
        """Look at the model, whose parameters need no memory yet."""
        super().__init__(parts)
        self._bucket_elements = bucket_elements(parts.device.type, parts.mesh.sharding.degree)
        self._flattening = ModelFlattening(
            parts.definition.model, parts.mesh.sharding, parts.dtype, self._bucket_elements
        )

    def finish(self, model: nn.Module) -> Engine:
        """See EngineBuilder."""
        parts = self._parts
        return BucketedEngine(
            parts.definition,
            parts.mesh,
            parts.device,
            parts.parallel.strategy,
            self._flattening.finish([block for _, block in parts.blocks]),
            self._bucket_elements,
            parts.build_optimizer,
            parts.loss_scaler,
        )


class BucketedZero3Builder(BucketedBuilder):
    """Builds zero3 and hsdp: each block goes into buckets of its own."""

    def prepare_block(self, name: str, block: nn.Module) -> None:
        """See EngineBuilder."""
        self._flattening.add(name, block)
