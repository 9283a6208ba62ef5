"""Configuration of distillation, and the rules that span its settings; imports no torch."""

from typing import Annotated

from pydantic import Field

from sharding.ranks.errors import UserError
from sharding.strict_model import SET, UNSET, Like, OnlyWith, StrictModel
from trainer.config.rows import TASK_SAMPLES

_TELL_CLASSES_APART = (*(name for name in TASK_SAMPLES if name != "regression"), Like("*:*", "module:Class"))
_READ_THE_SAME_EACH_TIME = tuple(name for name in TASK_SAMPLES if name not in ("regression", "masked-lm"))

LayerPair = tuple[int, int]


class DistillConfig(StrictModel):
    """A trained model, the teacher, whose predictions the run's model learns beside its own targets."""

    teacher: Annotated[
        str | None,
        OnlyWith({"task.name": _TELL_CLASSES_APART}, because="what is learnt are probabilities of classes or tokens"),
        OnlyWith(
            {"task.loss_chunk_tokens": UNSET}, because="the logits of both models are compared, and chunks leave none"
        ),
    ] = None
    """The teacher: a run, `RUN_FOLDER` (its newest checkpoint) or `RUN_FOLDER@STEP`, the URL of a folder of
    checkpoints, the folder of an exported model, or the name of a model on the hub. Null means none."""

    temperature: Annotated[float, OnlyWith(teacher=SET)] = Field(default=2.0, gt=0.0)
    """Both models' logits are divided by it before they are compared; 1 leaves them as they are."""

    weight: Annotated[float, OnlyWith(teacher=SET)] = Field(default=0.5, ge=0.0, le=1.0)
    """Share of the teacher in the training loss: weight x temperature^2 x KL(teacher, student) +
    (1 - weight) x the task's own loss, each summed over targets."""

    top_k: Annotated[
        int | None,
        OnlyWith(teacher=SET),
        OnlyWith(
            {"task.name": _READ_THE_SAME_EACH_TIME},
            because="what hides tokens, and what code of your own makes of samples, may differ each time",
        ),
        OnlyWith(
            {"data.factory": UNSET, "data.streaming": UNSET},
            because="a sample is looked up by its number, under which it must be the same each time",
        ),
        OnlyWith(factory=UNSET, because="its code may change, and what is kept would not"),
        OnlyWith(layers=UNSET, because="hidden states of all samples would be too large to keep"),
    ] = Field(default=None, ge=1)
    """Ask the teacher once for each training sample, before training, and keep in the cache how likely it takes so
    many classes or tokens to be, the likeliest, and all others together; the teacher is then in no memory while the
    student trains. Null asks it in each step, for all."""

    layers: Annotated[
        tuple[Annotated[LayerPair, Field(strict=False)], ...],
        Field(strict=False),
        OnlyWith(teacher=SET),
        OnlyWith({"compile.enabled": UNSET}, because="what a compiled block gives out cannot be looked at"),
    ] = ()
    """Pairs [student's block, teacher's block] whose outputs are to be alike, counted from 0, from the end if negative;
    both must have the same width, unless there is a `projection`."""

    projection: Annotated[bool, OnlyWith(layers=SET)] = False
    """Multiply the student's side of each pair by a matrix of its own, [teacher's width, student's width], that is
    trained with the student: blocks may have different widths. It is in checkpoints, and in no export."""

    layer_weight: Annotated[float, OnlyWith(layers=SET)] = Field(default=1.0, gt=0.0)
    """Factor of the mean squared difference of each pair's outputs, summed over targets, in the training loss."""

    factory: Annotated[str | None, OnlyWith(teacher=SET)] = None
    """`module:function` of your own that made the teacher, where its run says so: it is named here too, since it is
    code that runs."""

    trust_remote_code: Annotated[bool, OnlyWith(teacher=SET)] = False
    """Run Python code that the teacher brings along with its weights; false refuses such a teacher."""


def validate_distill(distill: DistillConfig) -> None:
    """Check that a teacher that is named has something to say.

    Raises:
        UserError: it has not.
    """
    if distill.teacher is not None and distill.weight == 0.0 and not distill.layers:
        raise UserError(
            f"distill.weight=0 leaves distill.teacher={distill.teacher} without any effect; raise it, name "
            "distill.layers, or remove the teacher."
        )
