"""Whether a run that goes on has the teacher that it had."""

from sharding.ranks.errors import UserError
from sharding.strict_model import StrictRecord
from trainer.distillation.named_teacher import NamedTeacher
from trainer.files.atomic_files import write_atomically
from trainer.run_folder.folder import RunFolder

TEACHER_FILE = "teacher.json"


class TeacherRecord(StrictRecord):
    """What a run's teacher was."""

    name: str
    """What `distill.teacher` called it."""

    step: int | None
    """Step of its checkpoint; None where it is no run."""

    contents_hash: str
    """Hash of all its values, which knows no layout."""


def check_same_teacher(folder: RunFolder, teacher: NamedTeacher, contents_hash: str) -> None:
    """Remember the teacher of a run that begins, and compare that of one that goes on.

    Its values count and not its name: a folder may have moved, and a run that is named without a step goes on.

    Args:
        folder: the run's.
        teacher: its teacher now.
        contents_hash: of its values.

    Raises:
        UserError: the run has checkpoints, and had another teacher.
    """
    step = None if teacher.manifest is None else teacher.manifest.training.step
    record = TeacherRecord(name=teacher.name, step=step, contents_hash=contents_hash)
    file = folder.path / TEACHER_FILE
    before = TeacherRecord.read(file) if folder.newest_checkpoint() is not None else None
    if before is None:
        write_atomically(file, record.model_dump_json(indent=1) + "\n")
        return
    if before.contents_hash != contents_hash:
        was = before.name if before.step is None else f"{before.name} at step {before.step}"
        now = record.name if step is None else f"{record.name} at step {step}"
        remedy = f"set distill.teacher={before.name.partition('@')[0]}@{before.step}" if before.step else "restore it"
        raise UserError(
            f"{folder.path} was taught by {was} so far, and distill.teacher={record.name} is another one ({now}); "
            f"{remedy}, or choose another name for this run."
        )
