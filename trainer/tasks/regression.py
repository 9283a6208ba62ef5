"""Regression: a number for each table's line, text, image or recording."""

from collections.abc import Mapping

import torch

from sharding.engine import Batch
from trainer.config.sections import TaskConfig
from trainer.data.facts import SampleFacts
from trainer.data.samples import FILLER
from trainer.tasks.losses import huber_sum, squared_error_sum
from trainer.tasks.scores import regression_scores, regression_sums
from trainer.tasks.supervised import SupervisedTask
from trainer.tasks.task import Better, Metric, Outputs, Sums


class Regression(SupervisedTask):
    """Predicts a number.

    The model predicts it in standard deviations from the mean of the training labels, so that no learning rate depends
    on a label's unit; so is the loss. ``mse``, ``mae`` and ``r2`` are of labels as they are. A batch has ``labels``,
    fp64 [micro], counted so and NaN where there is no target, and ``weights``, fp32 [micro], which are 0 there.
    """

    def __init__(self, settings: TaskConfig, facts: SampleFacts) -> None:
        """See SupervisedTask."""
        super().__init__(settings, facts)
        self._huber_delta = settings.huber_delta
        self._mean = facts.label_mean or 0.0
        self._scale = facts.label_scale or 1.0
        # By what samples are, for transformers has no head for regression but that of one label.
        if facts.image_shape is not None:
            self.head = "image-classification"
        elif facts.num_audio_samples is not None:
            self.head = "audio-classification"
        else:
            self.head = None if facts.vocab_size is None else "sequence-classification"

    @property
    def num_outputs(self) -> int:
        """One."""
        return 1

    def make_batch(self, samples: Batch, positions: torch.Tensor, training: bool) -> Batch:
        """See SupervisedTask."""
        batch = super().make_batch(samples, positions, training)
        is_filler = positions == FILLER
        # In fp64, since labels far from zero have few digits left for what tells them apart.
        labels = (samples["labels"].double() - self._mean) / self._scale
        batch["labels"] = torch.where(is_filler, torch.nan, labels)
        batch["weights"] = (~is_filler).float()
        return batch

    def loss(self, outputs: Outputs, batch: Batch) -> torch.Tensor:
        """See Task; squared error or Huber's loss, in units of the labels' standard deviation."""
        predictions = self._predictions(outputs)
        if self._settings.loss == "huber":
            return huber_sum(predictions, batch["labels"], batch["weights"], self._huber_delta)
        return squared_error_sum(predictions, batch["labels"], batch["weights"])

    def evaluate(self, outputs: Outputs, batch: Batch) -> Sums:
        """See Task."""
        sums = regression_sums(self._predictions(outputs), batch["labels"], batch["weights"])
        return sums | {"loss": self.loss(outputs, batch).double()}

    def num_targets(self, batch: Batch) -> int:
        """See Task."""
        return int(batch["weights"].sum())

    def metrics(self, sums: Mapping[str, torch.Tensor]) -> dict[str, Metric]:
        """See Task; ``loss`` in standard deviations, ``mse``, ``mae`` and ``r2`` of labels as they are."""
        loss = float(sums["loss"]) / max(float(sums["samples"]), 1.0)
        scores = {"loss": loss, **regression_scores(sums, self._scale)}
        return {name: Metric(scores[name], better) for name, better in self.directions().items()}

    def directions(self) -> dict[str, Better]:
        """See Task."""
        return {"loss": "lower", "mse": "lower", "mae": "lower", "r2": "higher"}

    def _predictions(self, outputs: Outputs) -> torch.Tensor:
        assert outputs.logits is not None, "the forward pass gives logits"
        return outputs.logits[:, 0]
