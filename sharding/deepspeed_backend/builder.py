"""From a model's blocks to DeepSpeed's engine."""

from torch import nn

from sharding.blocks import modules_outside, units_by_last_block
from sharding.deepspeed_backend.engine import DeepSpeedEngine
from sharding.deepspeed_backend.library import BlockPartitioner
from sharding.engine import Engine
from sharding.engine_builder import EngineBuilder, EngineParts
from sharding.pass_agreement import compare_passes


class DeepSpeedBuilder(EngineBuilder):
    """Builds zero1 and zero2: DeepSpeed is given the whole model."""

    def finish(self, model: nn.Module) -> Engine:
        """See EngineBuilder."""
        parts = self._parts
        return DeepSpeedEngine(
            compare_passes(parts, self._gathered_when_called(model), compares_parameters=True),
            parts.mesh,
            parts.device,
            parts.copies_dtype,
            parts.build_optimizer,
            parts.deepspeed_settings,
            parts.loss_scaler,
        )

    def _gathered_when_called(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        """Modules at whose call parameters are gathered, apart from the model itself."""
        return []


class DeepSpeedZero3Builder(DeepSpeedBuilder):
    """Builds zero3: DeepSpeed divides each block by itself."""

    def __init__(self, parts: EngineParts) -> None:
        """Bind to DeepSpeed's configuration.

        Raises:
            UserError: a setting needs what this machine lacks.
        """
        super().__init__(parts)
        model = parts.definition.model
        self._partitioner = BlockPartitioner(parts.deepspeed_settings, model, parts.mesh.sharding.degree)
        self._units = units_by_last_block(model, [block for _, block in parts.blocks])

    def prepare_block(self, name: str, block: nn.Module) -> None:
        """See EngineBuilder; blocks that share parameters are divided after the last of them."""
        for member in self._units.get(id(block), []):
            self._partitioner.partition(member)

    def _gathered_when_called(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        blocks = self._parts.blocks
        outside = modules_outside(model, [block for _, block in blocks])
        own = {id(module) for module in outside if next(module.parameters(recurse=False), None) is not None}
        return [*blocks, *((name, module) for name, module in model.named_modules() if id(module) in own)]
