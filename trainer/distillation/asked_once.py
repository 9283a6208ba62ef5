"""A teacher that is asked once for each training sample, before the student is built, and then is in no memory."""

import gc
import hashlib
import math
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from sharding.engine import Batch
from sharding.mesh import ParallelMesh
from sharding.precision import compute_dtype
from sharding.ranks.errors import UserError
from sharding.ranks.object_exchange import broadcast_object, gather_objects
from sharding.ranks.process_group import Ranks
from trainer.checkpoint.manifest import MANIFEST_NAME as CHECKPOINT_MANIFEST
from trainer.checkpoint.source import on_rank_0
from trainer.config import RunConfig
from trainer.data.identity import prepared_root
from trainer.data.rows_manifest import RECIPE_NAME
from trainer.data.samples import Samples
from trainer.data.shards import FileFacts
from trainer.distillation.kept_answers import (
    MANIFEST_NAME,
    AnswersKey,
    AnswersManifest,
    KeptAnswers,
    find_answers,
    samples_per_file,
    write_answers,
    write_manifest,
)
from trainer.distillation.named_teacher import NamedTeacher, find_teacher
from trainer.distillation.teacher import Teacher, build_teacher
from trainer.distillation.top_k import CLASSES
from trainer.files.locks import exclusive

_TELL_EVERY_S = 60.0


def answers_of_teacher(
    config: RunConfig,
    samples: Samples,
    mesh: ParallelMesh,
    ranks: Ranks,
    inform: Callable[[str], None],
    alive: Callable[[], None],
    check_hash: Callable[[str], None],
) -> KeptAnswers:
    """What the teacher of a run says of its training samples, asked now unless it was before; all ranks must call it.

    Args:
        config: the run, whose teacher all ranks find the same.
        samples: that it reads.
        mesh: the ranks, on which the teacher is laid out while it is asked.
        ranks: this rank's place.
        inform: tells a person, on rank 0.
        alive: is called after each micro-batch that the teacher was asked about, since all may take hours.
        check_hash: refuses a teacher whose values have another hash than they should; called by all ranks.

    Raises:
        UserError: the teacher cannot be had or does not fit, another run is asking it, or what was kept is damaged.
    """
    keys: list[AnswersKey] = []
    on_rank_0(lambda: keys.append(_key(config, samples, ranks.device)), ranks)
    key = broadcast_object(keys[0] if keys else None, ranks)
    assert key is not None, "rank 0 has one, or all have raised"
    folder = prepared_root(config.data) / f"teacher-{key.digest}"
    manifest = _find(folder, key, ranks)
    if manifest is None:
        with ExitStack() as lock:
            on_rank_0(lambda: _take(folder, lock), ranks)
            # Whoever had the lock before may have finished.
            manifest = _find(folder, key, ranks)
            if manifest is None:
                manifest = _ask(config, samples, key, folder, mesh, ranks, inform, alive, check_hash)
    check_hash(manifest.teacher_hash)
    inform(f"the teacher's answers to {manifest.num_samples:,} samples: {manifest.num_bytes:,} bytes in {folder}")
    return KeptAnswers(folder, manifest, verify=config.faults.verify_data)


def _key(config: RunConfig, samples: Samples, device: torch.device) -> AnswersKey:
    """All that decides what is kept of a run's teacher, which is fetched."""
    assert config.distill.top_k is not None, "a run that keeps answers says how many"
    return AnswersKey(
        teacher=_teacher_digest(find_teacher(config.distill)),
        samples=samples.fingerprint,
        sources=[source.name for source in config.data.mixture],
        task=config.task.name,
        sequence_length=samples.facts.sequence_length,
        document_mask=config.data.document_mask,
        compute=str(compute_dtype(config.precision, device)).removeprefix("torch."),
        top_k=config.distill.top_k,
        temperature=config.distill.temperature,
    )


def _teacher_digest(teacher: NamedTeacher) -> str:
    """Hash of the files that a teacher is, without its values being read where a manifest has their hashes."""
    if teacher.checkpoint is not None:
        return hashlib.sha256((teacher.checkpoint / CHECKPOINT_MANIFEST).read_bytes()).hexdigest()
    assert teacher.folder is not None, "a model of the hub was fetched"
    digest = hashlib.sha256()
    for path in sorted(teacher.folder.iterdir()):
        if path.name in ("config.json", RECIPE_NAME) or path.suffix in (".safetensors", ".bin", ".py"):
            with path.open("rb") as file:
                digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _find(folder: Path, key: AnswersKey, ranks: Ranks) -> AnswersManifest | None:
    """What is there, as rank 0 sees it; every rank must call it."""
    found: list[AnswersManifest | None] = [None]
    on_rank_0(lambda: found.append(find_answers(folder, key)), ranks)
    return broadcast_object(found[-1], ranks)


def _take(folder: Path, lock: ExitStack) -> None:
    """Keep other runs from asking, and begin with an empty folder."""

    def refuse() -> None:
        raise UserError(
            f"distill.top_k: another run is asking the same teacher about the same samples, into {folder}; start this "
            "one again when that has begun to train."
        )

    folder.parent.mkdir(parents=True, exist_ok=True)
    lock.enter_context(exclusive(folder.with_name(f".{folder.name}.lock"), on_wait=refuse))
    if folder.exists() and not (folder / MANIFEST_NAME).exists():
        # What another run, which has ended before it was done, has left.
        shutil.rmtree(folder)
    folder.mkdir(exist_ok=True)


def _ask(
    config: RunConfig,
    samples: Samples,
    key: AnswersKey,
    folder: Path,
    mesh: ParallelMesh,
    ranks: Ranks,
    inform: Callable[[str], None],
    alive: Callable[[], None],
    check_hash: Callable[[str], None],
) -> AnswersManifest:
    """Lay the teacher out, ask it about all samples, each rank a share, and take it away again."""
    teacher = build_teacher(config, samples.facts, mesh, ranks)
    teacher_hash, num_samples = teacher.contents_hash(ranks), samples.num_samples("train")
    check_hash(teacher_hash)
    inform(f"teacher: {teacher.description}; {teacher_hash}; asked once for each of {num_samples:,} samples")
    asked = _Asked(config, samples, teacher, alive)
    # How large answers are, one tells.
    first = asked.about(np.zeros(1, dtype=np.int64))
    sample_bytes = sum(column.nbytes for column in first.values())
    per_file = samples_per_file(sample_bytes, num_samples, mesh.data.degree)
    files: list[FileFacts] = []
    told_at = time.monotonic()
    for round_number in range(math.ceil(num_samples / per_file / mesh.data.degree)):
        number = round_number * mesh.data.degree + mesh.data.rank
        written = asked.write(folder, number, number * per_file, per_file, num_samples)
        # After each file, so that no rank is waited for longer than a collective may take.
        files += [facts for facts in gather_objects(written, ranks) if facts is not None]
        if time.monotonic() - told_at > _TELL_EVERY_S:
            told_at = time.monotonic()
            inform(f"asked about {min(len(files) * per_file, num_samples):,} of {num_samples:,} samples")
    manifest = AnswersManifest(
        key=key,
        teacher_hash=teacher_hash,
        num_samples=num_samples,
        num_classes=asked.num_classes,
        samples_per_file=per_file,
        files=sorted(files, key=lambda facts: (len(facts.file), facts.file)),
    )
    on_rank_0(lambda: write_manifest(folder, manifest), ranks)
    del teacher, asked
    # A model refers to itself, and the student needs the room.
    gc.collect()
    if ranks.device.type == "cuda":
        torch.cuda.empty_cache()
    return manifest


class _Asked:
    """A teacher on ranks, and what it is asked about."""

    def __init__(self, config: RunConfig, samples: Samples, teacher: Teacher, alive: Callable[[], None]) -> None:
        self._distill = config.distill
        self._micro_size = config.batch.micro_size
        self._samples = samples
        self._teacher = teacher
        self._alive = alive
        self.num_classes = 0

    def about(self, indices: np.ndarray) -> Batch:
        """What is kept of the answers to samples, on the host; all ranks must ask equally often."""
        read = self._samples.read("train", indices.tolist())
        batch = self._teacher.make_batch(read, torch.from_numpy(indices))
        top_k = self._distill.top_k
        assert top_k is not None, "a run that keeps answers says how many"
        kept, self.num_classes = self._teacher.answer_once(batch, top_k, self._distill.temperature)
        length = self._samples.facts.sequence_length
        if kept[CLASSES].ndim == 3 and length is not None:
            # Of texts as long as the longest beside them, all are kept at one length.
            kept = {name: _lengthened(column, length) for name, column in kept.items()}
        self._alive()
        return kept

    def write(self, folder: Path, number: int, start: int, num_rows: int, num_samples: int) -> FileFacts | None:
        """Ask about the samples of a file, of whom there may be none, and write it."""
        of_file = np.arange(start, start + num_rows)
        # Beyond the last sample that one is asked about once more, since all ranks must ask equally often.
        asked = np.minimum(of_file, num_samples - 1)
        parts = [self.about(asked[at : at + self._micro_size]) for at in range(0, num_rows, self._micro_size)]
        num_kept = int((of_file < num_samples).sum())
        if num_kept == 0:
            return None
        answers = {name: torch.cat([part[name] for part in parts])[:num_kept] for name in parts[0]}
        return write_answers(folder, number, answers)


def _lengthened(column: torch.Tensor, length: int) -> torch.Tensor:
    """A column [micro, length of these, ...] at the length of all; what is added stands at no target."""
    return functional.pad(column, (0, 0, 0, length - column.shape[1]))
