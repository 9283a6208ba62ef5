"""A teacher's answers to all training samples on disk: a folder of safetensors files and, written last, a manifest.

File f has samples [f x samples_per_file, (f + 1) x samples_per_file) of the split ``train``, whichever ranks wrote it.
"""

import hashlib
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from sharding.engine import Batch
from sharding.ranks.errors import UserError
from sharding.strict_model import StrictRecord
from trainer.data.shards import FileFacts
from trainer.files.atomic_files import write_atomically
from trainer.files.checked_json import dump_checked, load_checked

MANIFEST_NAME = "manifest.json"
_FILE_BYTES = 2**28
# Ranks wait for one another after each.
_MAX_FILE_SAMPLES = 4096


class AnswersKey(StrictRecord):
    """All that decides what the answers are; equal keys are equal answers."""

    version: int = 1
    """Of the form of the files."""

    teacher: str
    """SHA-256 of the manifest of its checkpoint, or of the files of an exported model."""

    samples: str
    """Fingerprint of the samples, which is of their token ids and so of the tokenizer too."""

    sources: list[str]
    """Names in `data.mixture` in their order, in which samples are numbered and of which no fingerprint tells."""

    task: str
    """`task.name`."""

    sequence_length: int | None
    """`data.sequence_length` where samples are texts."""

    document_mask: bool
    """`data.document_mask`."""

    compute: str
    """Format that the teacher computes in."""

    top_k: int
    """`distill.top_k`."""

    temperature: float
    """`distill.temperature`, at which the mass of all other classes is theirs."""

    @property
    def digest(self) -> str:
        """A name for the folder."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:16]


class AnswersManifest(StrictRecord):
    """What a folder of answers holds; without it there are none."""

    key: AnswersKey
    """Of what they are."""

    teacher_hash: str
    """Hash of the teacher's values, which knows no layout."""

    num_samples: int
    """Training samples."""

    num_classes: int
    """Classes or tokens that the teacher tells apart."""

    samples_per_file: int
    """Of every file but the last."""

    files: list[FileFacts]
    """In the order of samples."""

    @property
    def num_bytes(self) -> int:
        """Size of all files."""
        return sum(file.num_bytes for file in self.files)


def samples_per_file(sample_bytes: int, num_samples: int, num_writers: int) -> int:
    """How many samples go into a file, so that all writers have some and no file is large.

    Args:
        sample_bytes: of one sample.
        num_samples: samples of the split.
        num_writers: ranks that write.
    """
    return max(1, min(_FILE_BYTES // sample_bytes, _MAX_FILE_SAMPLES, math.ceil(num_samples / num_writers)))


def write_answers(folder: Path, number: int, answers: Batch) -> FileFacts:
    """Write one file, which counts only once a manifest names it.

    Args:
        folder: where to.
        number: of the file.
        answers: columns, dim 0 the sample, on the host.

    Raises:
        UserError: there is no room, or the folder cannot be written.
    """
    path = folder / f"answers-{number:06d}.safetensors"
    try:
        save_file(answers, path)
        with path.open("rb") as file:
            os.fsync(file.fileno())
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"distill.top_k: what the teacher says cannot be written to {path} ({error}); make room, lower "
            "distill.top_k, or name a data.cache_dir that all machines of the run see."
        ) from None
    return FileFacts(file=path.name, num_bytes=path.stat().st_size, sha256=digest)


def write_manifest(folder: Path, manifest: AnswersManifest) -> None:
    """Make the answers exist: the last thing that is written to their folder."""
    write_atomically(folder / MANIFEST_NAME, dump_checked(json.loads(manifest.model_dump_json())), has_one_writer=True)


def find_answers(folder: Path, key: AnswersKey) -> AnswersManifest | None:
    """What a folder holds, whose files are all there; None where nothing was finished.

    Raises:
        UserError: the manifest is damaged or of other answers, or a file is missing or has another size.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file():
        return None
    try:
        manifest = AnswersManifest.model_validate(load_checked(path.read_bytes()))
    except (OSError, ValueError, ValidationError) as error:
        raise damaged(folder, f"{MANIFEST_NAME} cannot be read ({str(error).splitlines()[0]})") from None
    if manifest.key != key:
        changed = [name for name, value in manifest.key if value != getattr(key, name)]
        raise damaged(folder, f"they are of another {' and '.join(changed)}")
    for facts in manifest.files:
        file = folder / facts.file
        num_bytes = file.stat().st_size if file.is_file() else 0
        if num_bytes != facts.num_bytes:
            raise damaged(folder, f"{facts.file} has {num_bytes} bytes instead of {facts.num_bytes}")
    return manifest


class KeptAnswers:
    """The answers to training samples, found by the samples' indices."""

    def __init__(self, folder: Path, manifest: AnswersManifest, *, verify: bool) -> None:
        """Bind to a folder.

        Args:
            folder: where they are.
            manifest: what they are.
            verify: compare each file with its SHA-256 when it is first read.
        """
        self.folder = folder
        self.manifest = manifest
        self._verify = verify
        self._files: dict[int, Batch] = {}

    def read(self, indices: Sequence[int]) -> Batch:
        """Columns of samples, in this order; see ``trainer.distillation.top_k``.

        Raises:
            UserError: a file is not as it was written, or is not to be seen from this machine.
        """
        places = [divmod(index, self.manifest.samples_per_file) for index in indices]
        rows = [{name: column[row] for name, column in self._file(file).items()} for file, row in places]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def _file(self, number: int) -> Batch:
        if number not in self._files:
            facts = self.manifest.files[number]
            path = self.folder / facts.file
            try:
                if self._verify:
                    with path.open("rb") as file:
                        if hashlib.file_digest(file, "sha256").hexdigest() != facts.sha256:
                            raise damaged(self.folder, f"{facts.file} does not have the SHA-256 of the manifest")
                # Mapped, so that only rows that are read are in memory.
                self._files[number] = load_file(path)
            except (OSError, SafetensorError) as error:
                raise damaged(
                    self.folder, f"{facts.file} cannot be read from this machine ({str(error).splitlines()[0]})"
                ) from None
        return self._files[number]


def damaged(folder: Path, reason: str) -> UserError:
    """An error about answers that are there and cannot be used."""
    return UserError(
        f"distill.top_k: what the teacher has said is kept in {folder}, but {reason}; delete the folder, and the same "
        "command asks the teacher again."
    )
