"""An exported model whose weights are quantized, as what an evaluation asks of an engine."""

from collections.abc import Iterable
from pathlib import Path

import torch

from sharding.engine import Batch
from sharding.micro_batches import on_device
from sharding.ranks.errors import UserError
from trainer.config import RunConfig
from trainer.data.facts import SampleFacts
from trainer.deploy.quantized_folder import load_folder, quantization_of
from trainer.model.models import build_model_on_meta
from trainer.tasks.named_sums import NamedSums
from trainer.tasks.task import Task


class QuantizedModel:
    """A whole model on this rank, evaluated by the kernels that its weights are quantized for."""

    def __init__(
        self, config: RunConfig, task: Task, facts: SampleFacts, named_sums: NamedSums, device: torch.device
    ) -> None:
        """Load the model that ``model.pretrained`` names.

        Args:
            config: made for the exported model.
            task: learns of its model what it makes batches by.
            facts: of the samples.
            named_sums: what is summed.
            device: where this rank computes.

        Raises:
            UserError: it is not whole, of another class than the task's, or needs what is not installed.
        """
        folder = Path(str(config.model.pretrained))
        expected = type(build_model_on_meta(task, config.model, facts))
        self._model = load_folder(folder).to(device)
        if type(self._model) is not expected:
            raise UserError(
                f"{folder} holds a {type(self._model).__name__}, and task.name={config.task.name} needs a "
                f"{expected.__name__}; name the folder of such a model."
            )
        self._named_sums = named_sums
        self._device = device

    def evaluate(self, batches: Iterable[Batch]) -> list[torch.Tensor]:
        """See Engine."""
        with torch.no_grad():
            return [self._named_sums(self._model, on_device(batch, self._device)) for batch in batches]


def is_quantized(config: RunConfig) -> bool:
    """Whether ``model.pretrained`` is a folder whose weights are quantized."""
    folder = config.model.pretrained
    return folder is not None and (Path(folder) / "config.json").exists() and quantization_of(Path(folder)) is not None
