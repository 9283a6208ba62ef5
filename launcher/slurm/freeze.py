"""A job's own copy of configuration and code, so that a queued job does not change under later edits."""

import json
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from launcher.slurm.own_modules import copy_modules
from sharding.ranks.errors import UserError
from trainer.config import RunConfig, config_to_yaml
from trainer.config.schema import OWN_MODULES
from trainer.run_folder.provenance import FROZEN_REVISION_NAME, code_revision

_ROOT = Path(__file__).resolve().parent.parent.parent
_FOLDERS = ("benchmarks", "launcher", "sharding", "shardline", "slurm", "trainer")
SCRIPTS_FOLDER = _ROOT / "slurm"


def new_submission(run_dir: Path) -> Path:
    """A new folder ``RUN/slurm/submission-N`` for what a job runs with.

    Raises:
        UserError: it cannot be made.
    """
    number = 1 + max((int(path.name.rpartition("-")[2]) for path in submissions(run_dir)), default=0)
    folder = run_dir.absolute() / "slurm" / f"submission-{number}"
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be made: {error.strerror}; choose another output_dir.") from None
    return folder


def submissions(run_dir: Path) -> list[Path]:
    """A run's submissions, oldest first."""
    found = [path for path in (run_dir / "slurm").glob("submission-*") if path.name.rpartition("-")[2].isdigit()]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def freeze(folder: Path, config: RunConfig, scripts: Path | None = None) -> None:
    """Write configuration, code, modules of the user's own, and the code's revision.

    Args:
        folder: the submission's.
        config: what the job is to train.
        scripts: folder of the user's own batch scripts, which go before ours.

    Raises:
        UserError: a module is not there.
    """
    code = folder / "code"
    for source in _sources():
        target = code / source.relative_to(_ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target)
    for script in [] if scripts is None else [*scripts.glob("*.sbatch"), *scripts.glob("*.sh")]:
        shutil.copy2(script, code / "slurm")
    for key, name in OWN_MODULES:
        section = getattr(config, key)
        module, colon, _ = (getattr(section, name) or "").partition(":")
        if not colon:
            continue
        copy_modules(module, code, section.folder, f"{key}.{name}")
        top = module.partition(".")[0]
        if (code / top).exists() or (code / f"{top}.py").exists():
            # The job takes it from the copy, whatever becomes of the original; what is installed is not copied.
            config = config.model_copy(update={key: section.model_copy(update={"folder": str(code.absolute())})})
    (folder / "config.yaml").write_text(config_to_yaml(config))
    # The copy has no history of its own.
    (code / FROZEN_REVISION_NAME).write_text(json.dumps(code_revision(), indent=2) + "\n")


def _sources() -> Sequence[Path]:
    """Files of our packages as they are now: those that git knows or would know, or all of an installation's."""
    if (_ROOT / ".git").exists():
        listed = subprocess.run(
            ["git", "-C", _ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *_FOLDERS],
            capture_output=True,
            text=True,
            check=False,
        )
        if listed.returncode == 0 and listed.stdout:
            paths = [_ROOT / name for name in listed.stdout.split("\0") if name]
            # Listed, but deleted and not yet committed so.
            return [path for path in paths if path.is_file()]
    paths = [path for name in _FOLDERS for path in (_ROOT / name).rglob("*") if path.is_file()]
    return [path for path in paths if "__pycache__" not in path.parts]
