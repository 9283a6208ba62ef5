"""Classification: of tables, texts, images and recordings, and of each token of a text."""

from collections.abc import Mapping

import torch

from sharding.engine import Batch
from sharding.ranks.errors import UserError
from trainer.config.sections import TaskConfig
from trainer.data.facts import SampleFacts
from trainer.tasks.losses import binary_cross_entropy_sum, cross_entropy_sum, has_target
from trainer.tasks.next_tokens import IGNORED_LABEL
from trainer.tasks.scores import (
    MAX_CONFUSED_CLASSES,
    MAX_RANKED_CLASSES,
    auroc_over_classes,
    class_sums,
    classification_scores,
    scores_by_class,
)
from trainer.tasks.supervised import SupervisedTask
from trainer.tasks.task import Better, ClassTable, Metric, Outputs, Sums


class Classification(SupervisedTask):
    """Which class a line of a table is of, and the base of all other classifications.

    Labels are class indices, or one-hot or soft targets: probabilities of classes, fp32 [micro, classes], all 0 where
    there is no target; what they are scored by is the likeliest class.
    """

    kept = frozenset({"probabilities"})

    def __init__(self, settings: TaskConfig, facts: SampleFacts) -> None:
        """Check the settings against the classes.

        Raises:
            UserError: there are less than two classes, or a setting does not fit them.
        """
        super().__init__(settings, facts)
        self._num_classes = len(facts.classes)
        if self._num_classes < 2:
            found = f"one alone, {facts.classes[0]}" if facts.classes else "none"
            raise UserError(f"task.name={settings.name} tells classes apart, but labels name {found}; look at them.")
        self._is_binary = settings.loss == "binary-cross-entropy"
        if self._is_binary and self._num_classes != 2:
            raise UserError(
                f"task.loss=binary-cross-entropy tells two classes apart, but there are {self._num_classes}; use "
                "cross-entropy."
            )
        self._label_smoothing = settings.label_smoothing
        self._class_weights = _class_weights(settings, facts)

    @property
    def num_outputs(self) -> int:
        """One for each class; under binary cross-entropy the log odds of the second."""
        return 1 if self._is_binary else self._num_classes

    def loss(self, outputs: Outputs, batch: Batch) -> torch.Tensor:
        """See Task; (binary) cross-entropy in nats, with class weights and label smoothing.

        The denominator is the number of targets whatever their weights: it is then one number for the whole step that
        is known before any loss is.
        """
        device = batch["labels"].device
        if self._class_weights is not None and self._class_weights.device != device:
            # Once, for it waits for the device.
            self._class_weights = self._class_weights.to(device)
        return self._loss_sum(outputs, batch, self._class_weights, self._label_smoothing)

    def evaluate(self, outputs: Outputs, batch: Batch) -> Sums:
        """See Task; the cross-entropy without class weights and smoothing, so that runs can be compared."""
        logits, labels = self._class_logits(outputs), batch["labels"]
        is_target = has_target(labels)
        if labels.is_floating_point():
            labels = torch.where(is_target, labels.argmax(dim=-1), IGNORED_LABEL)
        sums = class_sums(logits.argmax(dim=-1), labels, self._num_classes)
        sums["loss"] = self._loss_sum(outputs, batch).double()
        sums["targets"] = is_target.sum().double()
        if self._keeps_probabilities:
            probabilities = logits.double().softmax(dim=-1)
            if self._num_classes == 2:
                probabilities = probabilities[:, 1:]
            sums["probabilities"] = torch.cat([probabilities, labels[:, None]], dim=1)
        return sums

    def class_logits(self, outputs: Outputs, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """See Task."""
        return self._class_logits(outputs), has_target(batch["labels"])

    def num_targets(self, batch: Batch) -> int:
        """See Task."""
        return int(has_target(batch["labels"]).sum())

    def metrics(self, sums: Mapping[str, torch.Tensor]) -> dict[str, Metric]:
        """See Task; ``loss``, scores over classes, ``auroc``, and of few classes ``f1/CLASS`` of each."""
        scores = {"loss": float(sums["loss"]) / max(float(sums["targets"]), 1.0), **classification_scores(sums)}
        if self._keeps_probabilities:
            scores["auroc"] = auroc_over_classes(sums["probabilities"][:, :-1], sums["probabilities"][:, -1])
        if self._num_classes <= MAX_CONFUSED_CLASSES:
            by_class = zip(self._facts.classes, scores_by_class(sums), strict=True)
            scores |= {f"f1/{name}": of_class.f1 for name, of_class in by_class}
        directions = self.directions()
        return {name: Metric(score, directions[name]) for name, score in scores.items()}

    def directions(self) -> dict[str, Better]:
        """See Task."""
        names = ["accuracy", "precision_macro", "recall_macro", "f1_macro", "f1_micro"]
        names += ["auroc"] if self._keeps_probabilities else []
        names += [f"f1/{name}" for name in self._facts.classes] if self._num_classes <= MAX_CONFUSED_CLASSES else []
        return {"loss": "lower", **dict.fromkeys(names, "higher")}

    def class_table(self, sums: Mapping[str, torch.Tensor]) -> ClassTable:
        """See Task."""
        confusion = sums["confusion"].long().tolist() if "confusion" in sums else None
        return ClassTable(self._facts.classes, scores_by_class(sums), confusion)

    @property
    def _keeps_probabilities(self) -> bool:
        return "probabilities" in self.kept and self._num_classes <= MAX_RANKED_CLASSES

    def _loss_sum(
        self, outputs: Outputs, batch: Batch, weights: torch.Tensor | None = None, smoothing: float = 0.0
    ) -> torch.Tensor:
        assert outputs.logits is not None, "the forward pass gives logits"
        compute = binary_cross_entropy_sum if self._is_binary else cross_entropy_sum
        return compute(outputs.logits, batch["labels"], weights, smoothing)

    def _class_logits(self, outputs: Outputs) -> torch.Tensor:
        """Logits of all classes, [..., classes]; their differences are what is known."""
        logits = outputs.logits
        assert logits is not None, "the forward pass gives logits"
        return torch.cat([torch.zeros_like(logits), logits], dim=-1) if self._is_binary else logits


class SequenceClassification(Classification):
    """Which class a text is of."""

    head = "sequence-classification"


class ImageClassification(Classification):
    """Which class an image is of."""

    head = "image-classification"


class AudioClassification(Classification):
    """Which class a recording is of."""

    head = "audio-classification"


class TokenClassification(Classification):
    """Which class each token of a text is of; each counts as one target, those of label -100 as none."""

    head = "token-classification"
    # A score for each token of a split would be too much.
    kept = frozenset()

    def _expected_shape(self, batch: Batch) -> tuple[int, ...]:
        return (*batch["labels"].shape[:2], self.num_outputs)


def _class_weights(settings: TaskConfig, facts: SampleFacts) -> torch.Tensor | None:
    """The weight of each class, fp32 [classes]; None where all are 1.

    Raises:
        UserError: there are not as many weights as classes, or a class that balancing divides by has no row.
    """
    weights = settings.class_weights
    if weights is None:
        return None
    names = ", ".join(facts.classes)
    if weights == "balanced":
        counts = torch.tensor(facts.class_counts, dtype=torch.float64)
        absent = [name for name, count in zip(facts.classes, facts.class_counts, strict=False) if count == 0]
        if absent or len(counts) != len(facts.classes):
            raise UserError(
                "task.class_weights=balanced divides by the number of training rows of each class, and there are none "
                f"of {', '.join(absent) or names}; write a weight for each class."
            )
        # As scikit-learn's "balanced": their mean over samples is 1.
        return (counts.sum() / (len(counts) * counts)).float()
    if len(weights) != len(facts.classes):
        raise UserError(
            f"task.class_weights has {len(weights)} weights for {len(facts.classes)} classes; write one for each of "
            f"{names}, in this order."
        )
    return torch.tensor(weights)
