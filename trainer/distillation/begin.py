"""The beginning of distillation on ranks: the teacher is checked, laid out, and compared with the one before."""

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from sharding.mesh import ParallelMesh
from sharding.ranks.errors import UserError
from sharding.ranks.object_exchange import broadcast_object
from sharding.ranks.process_group import Ranks
from trainer.checkpoint.reader import CheckpointReader
from trainer.checkpoint.source import on_rank_0
from trainer.config import RunConfig
from trainer.data.loader import ReadBeside
from trainer.data.prepared import Prepared
from trainer.data.samples import Samples
from trainer.data.tokenizer import first_difference, load_tokenizer
from trainer.distillation.asked_once import answers_of_teacher
from trainer.distillation.identity import check_same_teacher
from trainer.distillation.loss import DistillationLoss
from trainer.distillation.named_teacher import NamedTeacher, check_corpus, check_teacher, find_teacher
from trainer.distillation.teacher import build_teacher
from trainer.model.fetch import fetch_pretrained
from trainer.run_folder.folder import RunFolder
from trainer.tasks.task import Task


def begin_distillation(
    config: RunConfig,
    task: Task,
    corpus: Prepared,
    samples: Samples,
    mesh: ParallelMesh,
    ranks: Ranks,
    run_folder: RunFolder,
    inform: Callable[[str], None],
    alive: Callable[[], None],
) -> tuple[DistillationLoss, ReadBeside | None] | None:
    """The training loss of a run that has a teacher, which is then on ranks or was asked; every rank must call it.

    Args:
        config: the run.
        task: the run's.
        corpus: what it reads.
        samples: of that.
        mesh: the ranks.
        ranks: this rank's place.
        run_folder: remembers who the teacher is.
        inform: tells a person, on rank 0.
        alive: see ``answers_of_teacher``.

    Returns:
        The loss, and what reads the answers that are kept of a teacher that was asked before, for whoever loads
        training samples. None where the run has no teacher.

    Raises:
        UserError: the teacher cannot be had, does not fit the run, or is another one than the run had so far.
    """
    if config.distill.teacher is None:
        return None
    name, config = str(config.distill.teacher), _as_rank_0_finds_it(config, ranks)
    on_rank_0(lambda: check_fit(config, corpus), ranks)
    named = replace(find_teacher(config.distill), name=name)

    def check_hash(contents_hash: str) -> None:
        on_rank_0(lambda: check_same_teacher(run_folder, named, contents_hash), ranks)

    if config.distill.top_k is None:
        teacher = build_teacher(config, samples.facts, mesh, ranks)
        contents_hash = teacher.contents_hash(ranks)
        check_hash(contents_hash)
        inform(f"teacher: {teacher.description}; {contents_hash}")
        return DistillationLoss(task, teacher, config.distill), None
    answers = answers_of_teacher(config, samples, mesh, ranks, inform, alive, check_hash)
    loss = DistillationLoss(task, None, config.distill, num_kept_classes=answers.manifest.num_classes)
    return loss, answers.read


def _as_rank_0_finds_it(config: RunConfig, ranks: Ranks) -> RunConfig:
    """The configuration with a teacher that is the same to all ranks; every rank must call it.

    A run that still trains may save between two looks for its newest checkpoint.
    """
    names: list[str] = []
    on_rank_0(lambda: names.append(_with_step(find_teacher(config.distill))), ranks)
    config = _taught_by(config, broadcast_object(names[0] if names else "", ranks))
    named = find_teacher(config.distill)
    if named.checkpoint is not None or named.folder is not None:
        return config
    return _taught_by(config, fetch_pretrained(named.name, ranks, "distill.teacher"))


def _with_step(named: NamedTeacher) -> str:
    """Its name, of a run such that it stays that of one checkpoint."""
    step = "" if named.manifest is None else f"@{named.manifest.training.step}"
    return named.name if named.name.endswith(step) else f"{named.name}{step}"


def _taught_by(config: RunConfig, name: str) -> RunConfig:
    return config.model_copy(update={"distill": config.distill.model_copy(update={"teacher": name})})


def check_fit(config: RunConfig, corpus: Prepared) -> None:
    """Check that a run's teacher is there, and that it knows the run's samples, token ids included.

    Args:
        config: the run.
        corpus: what it reads.

    Raises:
        UserError: see ``check_teacher`` and ``check_corpus``; also where a token has another id.
    """
    check_teacher(config)
    check_corpus(config, corpus)
    if corpus.tokenizer_dir is not None:
        _check_tokenizer(find_teacher(config.distill), corpus.tokenizer_dir)


def _check_tokenizer(teacher: NamedTeacher, prepared: Path) -> None:
    ours = load_tokenizer(str(prepared), packs=False).get_vocab()
    with tempfile.TemporaryDirectory(prefix="shardline-tokenizer-") as folder:
        if teacher.checkpoint is not None:
            if not CheckpointReader(teacher.checkpoint).unpack_tokenizer(Path(folder)):
                return
            its = load_tokenizer(folder, packs=False).get_vocab()
        else:
            try:
                its = load_tokenizer(str(teacher.folder or teacher.name), packs=False).get_vocab()
            except UserError:
                # Whoever names a teacher that comes without a tokenizer must know what it was trained with.
                return
    if difference := first_difference(ours, its):
        raise UserError(
            f"the tokenizer of this run's corpus does not have the token ids of {teacher.label}, to which they would "
            f"mean something else ({difference}); name the folder of the teacher's export as data.tokenizer."
        )
