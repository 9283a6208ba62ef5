"""From a model's blocks to the bucketed engine."""

from torch import nn

from sharding.bucketed.block_gathers import BlockBuckets
from sharding.bucketed.engine import BucketedEngine
from sharding.engine import Engine
from sharding.engine_builder import EngineBuilder, EngineParts
from sharding.memory_formula import BUCKET_ELEMENTS


class BucketedBuilder(EngineBuilder):
    """Builds zero1 and zero2: the model goes into buckets as a whole."""

    _block_buckets: BlockBuckets | None = None

    def finish(self, model: nn.Module) -> Engine:
        """See EngineBuilder."""
        parts = self._parts
        return BucketedEngine(
            parts.definition,
            parts.mesh,
            parts.device,
            parts.parallel.strategy,
            parts.autocast_dtype,
            parts.build_optimizer,
            parts.loss_scaler,
            self._block_buckets,
        )


class BucketedZero3Builder(BucketedBuilder):
    """Builds zero3: each block goes into buckets of its own."""

    def __init__(self, parts: EngineParts) -> None:
        """Look at the model, whose parameters need no memory yet."""
        super().__init__(parts)
        limit = BUCKET_ELEMENTS[parts.device.type]
        self._block_buckets: BlockBuckets = BlockBuckets(parts.definition.model, parts.mesh, parts.dtype, limit)

    def prepare_block(self, name: str, block: nn.Module) -> None:
        """See EngineBuilder."""
        self._block_buckets.add(name, block)
