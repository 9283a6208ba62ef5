"""A teacher on ranks: its model, by the order of the engines and outside of them, and the task that runs it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from sharding.engine import Batch
from sharding.frozen_model import FrozenModel, build_frozen_model
from sharding.initialization import InitializeModule
from sharding.mesh import ParallelMesh
from sharding.micro_batches import on_device
from sharding.part import Part
from sharding.precision import compute_dtype
from sharding.ranks.errors import UserError
from sharding.ranks.object_exchange import gather_objects
from sharding.ranks.process_group import Ranks
from sharding.state import hash_over_ranks
from trainer.architectures.config import max_positions
from trainer.checkpoint.reader import CheckpointReader
from trainer.config import RunConfig
from trainer.config.sections import ModelConfig, TaskConfig
from trainer.config.stages import stages_of
from trainer.data.facts import SampleFacts
from trainer.distillation.hidden_states import block_at, recorded
from trainer.distillation.named_teacher import NamedTeacher, find_teacher
from trainer.distillation.projections import add_projections, hidden_size, output_widths
from trainer.distillation.top_k import kept_answer
from trainer.model.document_mask import check_architecture
from trainer.model.fetch import fetch_pretrained
from trainer.model.lora import add_adapters, initializing_adapters
from trainer.model.models import build_model_on_meta, transformers_config
from trainer.model.pretrained import PretrainedWeights
from trainer.model.refusals import refuse_encoder
from trainer.tasks.causal_lm import predicts_next_tokens
from trainer.tasks.registry import configured_task
from trainer.tasks.supervised import SupervisedTask
from trainer.tasks.task import Task


@dataclass(frozen=True)
class TeacherModel:
    """A teacher that is on no rank yet.

    Attributes:
        named: what it is.
        task: the run's, for this model.
        model: without memory, or with.
        initialize: gives a module of it initial values.
        read: fills a part of it with the teacher's values.
        facts: what it knows of samples.
        widths: of the outputs of its blocks that are compared by way of projections.
    """

    named: NamedTeacher
    task: Task
    model: nn.Module
    initialize: InitializeModule
    read: Callable[[Part], None]
    facts: SampleFacts
    widths: tuple[int, ...] = ()

    @property
    def num_parameters(self) -> int:
        """All of them, shared ones once."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def description(self) -> str:
        """What it is, in a few words."""
        step = "" if self.named.manifest is None else f", step {self.named.manifest.training.step}"
        return f"{self.num_parameters:,} parameters of {self.named.name}{step}"


class Teacher:
    """A teacher that ranks can ask."""

    def __init__(
        self,
        source: TeacherModel,
        frozen: FrozenModel,
        facts: SampleFacts,
        layers: tuple[int, ...],
        device: torch.device,
    ) -> None:
        """Bind to a model on ranks.

        Args:
            source: what it was made of.
            frozen: the model.
            facts: of the student's samples.
            layers: numbers of the blocks whose outputs are asked for.
            device: where this rank computes.
        """
        self._task = source.task
        self._frozen = frozen
        self._blocks = [block_at(source.model, number, f"{source.named.label} has") for number in layers]
        self._renormalize = renormalization(facts, source.facts)
        self._label = source.named.label
        self._device = device
        self.facts = facts
        self.widths = source.widths
        self.description = source.description

    def answer(self, batch: Batch) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Logits of the classes, fp32 [..., classes], and outputs of blocks, for a batch of the student's.

        Every rank must call it.

        Raises:
            UserError: the model cannot compute on its first batch.
        """
        batch = self._renormalize(batch)
        if isinstance(self._task, SupervisedTask):
            batch = self._task.padded(batch)
        with _speaking_of(self._label), recorded(self._blocks) as states:
            outputs = self._frozen.run(lambda model: self._task.forward(model, batch))
            found = self._task.class_logits(outputs, batch)
        assert found is not None, "a task that has the method gives logits"
        return found[0].float(), states()

    def make_batch(self, samples: Batch, positions: torch.Tensor) -> Batch:
        """A training batch of samples as they were read, on the host; ``Task.make_batch`` of the teacher's own task."""
        return self._task.make_batch(samples, positions, training=True)

    def answer_once(self, batch: Batch, top_k: int, temperature: float) -> tuple[Batch, int]:
        """What is kept of the answer to a batch that is on the host, before there is an engine; all ranks must call it.

        Args:
            batch: a training batch.
            top_k: see ``trainer.distillation.top_k.kept_answer``.
            temperature: likewise.

        Returns:
            The columns, on the host, and the number of all classes.

        Raises:
            UserError: the model cannot compute on its first batch.
        """
        logits, _ = self.answer(on_device(batch, self._device))
        kept = kept_answer(logits, top_k, temperature)
        return {name: column.cpu() for name, column in kept.items()}, logits.shape[-1]

    def parts(self) -> list[Part]:
        """This rank's part of each of its tensors; live."""
        return self._frozen.parts()

    def contents_hash(self, ranks: Ranks) -> str:
        """A hash of all its values that does not depend on the layout; every rank must call it."""
        return f"{hash_over_ranks(self.parts(), ranks):016x}"


def build_teacher(config: RunConfig, facts: SampleFacts, mesh: ParallelMesh, ranks: Ranks) -> Teacher:
    """The teacher of a run, on ranks, with its weights; every rank must call it.

    Args:
        config: the run, which names one.
        facts: of its samples.
        mesh: the ranks.
        ranks: this rank's place.

    Raises:
        UserError: it cannot be had, is damaged, or does not fit the run.
    """
    named = find_teacher(config.distill)
    if named.checkpoint is None and named.folder is None:
        fetch_pretrained(named.name, ranks, "distill.teacher")
    source = teacher_on_meta(named, config, facts)
    if named.checkpoint is not None:
        _verify(CheckpointReader(named.checkpoint), ranks)
    strategy, dtype = config.parallel.strategy, compute_dtype(config.precision, ranks.device)
    frozen = build_frozen_model(source.model, source.initialize, mesh, ranks.device, strategy=strategy, dtype=dtype)
    for part in frozen.parts():
        source.read(part)
    layers = tuple(of_teacher for _, of_teacher in config.distill.layers)
    return Teacher(source, frozen, facts, layers, ranks.device)


def teacher_on_meta(
    named: NamedTeacher, config: RunConfig, facts: SampleFacts, *, may_download: bool = True
) -> TeacherModel:
    """The model of a teacher, without memory.

    Args:
        named: the teacher.
        config: the run that learns from it.
        facts: of that run's samples.
        may_download: whether the weights of a model on the hub may be; else those are not read.

    Raises:
        UserError: it cannot be built, has other tensors than its weights, or cannot take the run's samples; or the
            task has no classes.
    """
    known = named.facts(facts)
    settings, task = _settings(named, config), configured_task(_task(named, config), known, config.seed)
    if getattr(type(task), "class_logits", Task.class_logits) is Task.class_logits:
        raise UserError(
            f"{named.label} teaches by logits of classes, but task.name={config.task.name} has none; give it a method "
            "class_logits, as trainer/tasks/task.py says."
        )
    with _speaking_of(named.label):
        model = build_model_on_meta(task, settings, known)
        model_config = transformers_config(model, settings, known)
        if model_config is not None:
            limit, length = max_positions(model_config), facts.sequence_length
            if limit is not None and length is not None and limit < length:
                raise UserError(f"it has {limit} positions, fewer than data.sequence_length={length}; lower that.")
            if predicts_next_tokens(task):
                refuse_encoder(config.model_copy(update={"model": settings}), model_config)
        masked = next((one.config for one in stages_of(config) if one.config.data.document_mask), None)
        if masked is not None:
            check_architecture(masked.model_copy(update={"model": settings}), task, known)
        if named.checkpoint is not None:
            add_adapters(model, settings)
            read = CheckpointReader(named.checkpoint).read_into
        elif named.folder is not None or may_download:
            place = str(named.folder or named.name)
            read = PretrainedWeights(place, model, task.pretrained_name, setting="distill.teacher").read_into
        else:
            read = _unread
    numbers = [number for _, number in config.distill.layers]
    for number in numbers:
        block_at(model, number, f"{named.label} has")
    widths = output_widths(model, facts, numbers, named.label) if config.distill.projection else ()
    initialize = initializing_adapters(model, lambda module: task.initialize(model, module))
    return TeacherModel(named, task, model, initialize, read, known, widths)


def try_teacher(config: RunConfig, student: nn.Module, facts: SampleFacts) -> TeacherModel | None:
    """The teacher of a run without memory, as far as it can be had without a download; None where there is none.

    Args:
        config: the run.
        student: its model, which gets the projections that the run has.
        facts: of its samples.

    Raises:
        UserError: see ``teacher_on_meta``; also where a block that is named is not there, or has another width than
            the teacher's, as far as configurations tell.
    """
    if config.distill.teacher is None:
        return None
    for number, _ in config.distill.layers:
        block_at(student, number, "the model has")
    source = teacher_on_meta(find_teacher(config.distill), config, facts, may_download=False)
    if config.distill.projection:
        ours_of_pairs = output_widths(student, facts, [number for number, _ in config.distill.layers], "the model")
        add_projections(student, config.distill.layers, list(zip(ours_of_pairs, source.widths, strict=True)))
        return source
    ours, its = hidden_size(student), hidden_size(source.model)
    if config.distill.layers and ours and its and ours != its:
        raise UserError(
            f"distill.layers compares outputs of blocks, but those of the model have {ours} elements and those of "
            f"{source.named.label} {its}; set distill.projection=true, or choose models of one hidden_size."
        )
    return source


def renormalization(facts: SampleFacts, known: SampleFacts) -> Callable[[Batch], Batch]:
    """From a batch as the student reads it to one whose numbers are normalised by the teacher's training rows.

    Args:
        facts: of the student's samples.
        known: what the teacher knows of samples.
    """
    ours, its = (facts.means, facts.scales), (known.means, known.scales)
    if ours == its or not all((*ours, *its)):
        return lambda batch: batch
    means, scales = (torch.tensor(values, dtype=torch.float64) for values in ours)
    other_means, other_scales = (torch.tensor(values, dtype=torch.float64) for values in its)
    factors, offsets = (scales / other_scales).float(), ((means - other_means) / other_scales).float()

    def renormalize(batch: Batch) -> Batch:
        changed: Batch = {}
        for name, dim in (("features", -1), ("pixel_values", -3), ("input_values", None)):
            if name in batch:
                column = batch[name]
                shape = (-1,) if dim is None else (-1, *([1] * (-dim - 1)))
                factor, offset = (numbers.to(column.device).view(shape) for numbers in (factors, offsets))
                changed[name] = column * factor + offset
        return batch | changed

    return renormalize


def _unread(part: Part) -> None:
    raise AssertionError(f"{part.name} is of weights that were not to be downloaded")


def _settings(named: NamedTeacher, config: RunConfig) -> ModelConfig:
    """The section ``model`` of the teacher."""
    if named.config is not None:
        return named.config.model
    # Of what transformers makes, attention may be computed as the student's is.
    is_named = (config.model.architecture or config.model.pretrained) is not None
    return ModelConfig(
        pretrained=str(named.folder or named.name),
        attention=config.model.attention if is_named else "sdpa",
        trust_remote_code=config.distill.trust_remote_code,
    )


def _task(named: NamedTeacher, config: RunConfig) -> TaskConfig:
    """The section ``task`` by which the teacher is run."""
    if named.config is not None:
        # The code of a task of the user's own is that which the run names.
        return named.config.task.model_copy(update={"loss_chunk_tokens": 0, "folder": config.task.folder})
    # Of two classes it may have one logit, the log odds of the second, whatever the student has.
    loss = "binary-cross-entropy" if len(named.class_names) == 1 else "auto"
    return config.task.model_copy(update={"loss_chunk_tokens": 0, "loss": loss})


def _verify(reader: CheckpointReader, ranks: Ranks) -> None:
    """Compare a checkpoint with its manifest, each rank a share; all raise what one of them finds."""
    fault: UserError | None = None
    try:
        reader.verify(ranks.rank, ranks.world_size)
    except UserError as error:
        fault = error
    faults = [fault for fault in gather_objects(fault, ranks) if fault is not None]
    if faults:
        raise UserError(f"the teacher's {faults[0]}")


@contextmanager
def _speaking_of(label: str) -> Iterator[None]:
    """Put the name of the teacher before what is wrong with it."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error) if str(error).startswith("distill.") else f"{label}: {error}") from None
