"""The training loss of a student: its task's own, mixed with how far it is from what its teacher says."""

import torch
from torch import nn

from sharding.engine import Batch
from sharding.ranks.errors import UserError
from trainer.config.distill import DistillConfig, LayerPair
from trainer.distillation.hidden_states import block_at, recorded
from trainer.distillation.projections import add_projections, output_widths, project
from trainer.distillation.teacher import Teacher
from trainer.distillation.top_k import KEPT, top_k_divergence_sum
from trainer.tasks.divergence import difference_sum, divergence_sum
from trainer.tasks.task import Outputs, Task


class DistillationLoss:
    """A loss function for an engine; evaluation stays the task's own."""

    def __init__(
        self, task: Task, teacher: Teacher | None, settings: DistillConfig, *, num_kept_classes: int = 0
    ) -> None:
        """Bind to a task and a teacher.

        Args:
            task: makes the student's predictions and its own loss.
            teacher: is asked for each micro-batch, before the student computes; None where it was asked before, and
                batches have what is kept of its answers, see ``trainer.distillation.top_k``.
            settings: the section ``distill``.
            num_kept_classes: that a teacher tells apart who was asked before.
        """
        self._task = task
        self._num_kept_classes = num_kept_classes
        self._teacher = teacher
        self._settings = settings
        self._blocks: list[nn.Module] | None = None
        self._projections: dict[LayerPair, nn.Linear] = {}

    def add_projections(self, model: nn.Module) -> list[nn.Module]:
        """Give the student what makes its hidden states as wide as the teacher's, where the run has that.

        Args:
            model: on the meta device, before an engine is built of it.

        Returns:
            What was added, each a module with a method ``reset_parameters``.

        Raises:
            UserError: it is not known how wide the outputs of its blocks are.
        """
        settings = self._settings
        if settings.projection:
            assert self._teacher is not None, "whose hidden states are compared is asked in each step"
            numbers = [of_student for of_student, _ in settings.layers]
            own = output_widths(model, self._teacher.facts, numbers, "the model")
            widths = list(zip(own, self._teacher.widths, strict=True))
            self._projections = add_projections(model, settings.layers, widths)
        return list(self._projections.values())

    def __call__(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """The summed loss of a micro-batch's targets, an fp32 scalar with a gradient; every rank must call it.

        Raises:
            UserError: predictions or hidden states of the two have different shapes, or the task has no classes.
        """
        settings = self._settings
        if self._blocks is None:
            self._blocks = [block_at(model, of_student, "the model has") for of_student, _ in settings.layers]
        if self._teacher is None:
            # What is kept of answers is no input of a model.
            return self._mixed_with_kept(model, {name: batch[name] for name in batch if name not in KEPT}, batch)
        logits, states = self._teacher.answer(batch)
        with recorded(self._blocks, self._projected) as own_states:
            outputs = self._task.forward(model, batch)
        loss = self._mixed(outputs, logits, batch)
        for pair, own, its in zip(settings.layers, own_states(), states, strict=True):
            if own.shape != its.shape:
                raise UserError(
                    f"distill.layers=[{pair[0]}, {pair[1]}] compares outputs of shape {list(own.shape)} and, of the "
                    f"teacher, {list(its.shape)}; choose blocks of one width, set distill.projection=true, or leave "
                    "the pair out."
                )
            loss = loss + settings.layer_weight * difference_sum(
                own, its, self._is_target(outputs, batch), _tokens(batch)
            )
        return loss

    def _projected(self, place: int, state: torch.Tensor) -> torch.Tensor:
        pair = self._settings.layers[place]
        return project(state, self._projections[pair], pair) if pair in self._projections else state

    def _mixed(self, outputs: Outputs, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        settings = self._settings
        own = (1 - settings.weight) * self._task.loss(outputs, batch)
        if settings.weight == 0:
            return own
        student, is_target = self._class_logits(outputs, batch)
        self._check_shape(student, tuple(logits.shape))
        return own + settings.weight * divergence_sum(student, logits, is_target, settings.temperature)

    def _mixed_with_kept(self, model: nn.Module, batch: Batch, kept: Batch) -> torch.Tensor:
        settings = self._settings
        outputs = self._task.forward(model, batch)
        student, is_target = self._class_logits(outputs, batch)
        self._check_shape(student, (*student.shape[:-1], self._num_kept_classes))
        divergence = top_k_divergence_sum(student, kept, is_target, settings.temperature)
        return (1 - settings.weight) * self._task.loss(outputs, batch) + settings.weight * divergence

    def _check_shape(self, student: torch.Tensor, its: tuple[int, ...]) -> None:
        if tuple(student.shape) != its:
            raise UserError(
                f"the model's predictions have shape {list(student.shape)}, and those of distill.teacher="
                f"{self._settings.teacher} {list(its)}; name a teacher for the same classes."
            )

    def _is_target(self, outputs: Outputs, batch: Batch) -> torch.Tensor:
        return self._class_logits(outputs, batch)[1]

    def _class_logits(self, outputs: Outputs, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        found = self._task.class_logits(outputs, batch)
        assert found is not None, "the teacher has the same task, and has answered"
        return found


def _tokens(batch: Batch) -> torch.Tensor | None:
    """What is no padding, bool [micro, length]; None where samples are no texts, or nothing is padded."""
    mask = batch.get("attention_mask")
    return None if mask is None else mask > 0
