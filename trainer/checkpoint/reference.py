"""Checkpoints and runs by the words that a person names them with; imports no torch."""

from pathlib import Path

from sharding.ranks.errors import UserError
from trainer.config import RunConfig
from trainer.config.budget import budget, budget_of
from trainer.files.storage import CheckpointPath, is_url, list_folders, locate
from trainer.run_folder.events import read_events
from trainer.run_folder.folder import RunFolder
from trainer.run_folder.listing import MANIFEST_NAME, checkpoint_folder, checkpoint_step, list_checkpoints


def resolve_checkpoint(reference: str, setting: str = "checkpoint.from") -> CheckpointPath:
    """The checkpoint folder that ``RUN_FOLDER`` (its newest) or ``RUN_FOLDER@STEP`` names.

    In place of the run's folder there may be the URL that its checkpoints lie under.

    Args:
        reference: what a person wrote.
        setting: where, to speak of.

    Raises:
        UserError: there is no such run or checkpoint.
    """
    folder_text, separator, step_text = reference.rpartition("@")
    if not separator:
        folder_text = reference
    elif not step_text.isdigit():
        raise UserError(f"{setting}={reference}: {step_text!r} is not a step; write RUN_FOLDER@STEP.")
    checkpoints = checkpoints_of(setting, folder_text)
    if separator:
        path = checkpoint_folder(checkpoints, int(step_text))
        if not (path / MANIFEST_NAME).exists():
            raise UserError(f"{setting}={reference}: there is no checkpoint {path}; name another step.")
        return path
    found = list_checkpoints(checkpoints)
    if not found:
        raise UserError(f"{setting}={reference}: {folder_text} has no checkpoint; name another run folder.")
    return found[-1][1]


def check_source(config: RunConfig, run_folder: RunFolder) -> None:
    """Check, before ranks start, what ``checkpoint.from`` names and that a fork of it has something left to train.

    Raises:
        UserError: there is no such run or checkpoint, or nothing is left.
    """
    settings = config.checkpoint
    if settings.from_ is None or run_folder.newest_checkpoint() is not None:
        return
    step = checkpoint_step(resolve_checkpoint(settings.from_))
    if settings.load == "all" and step is not None:
        check_fork(config, step)


def check_fork(config: RunConfig, step: int) -> None:
    """Assert that something is left to train after the step that a fork begins from.

    Raises:
        UserError: nothing is.
    """
    if not config.is_length_known or config.num_steps > step:
        return
    if config.stages:
        raise UserError(
            f"checkpoint.from={config.checkpoint.from_} goes on after step {step}, but the stages come to "
            f"{config.num_steps} steps, which leaves none to train; lengthen the last one, or set "
            "checkpoint.load=weights to begin at step 0 with its parameters."
        )
    key, value = budget(config)
    raise UserError(
        f"checkpoint.from={config.checkpoint.from_} goes on after step {step}, but {key}={value} leaves "
        f"{config.num_steps} - {step} = {config.num_steps - step} steps to train; set {key} to more than "
        f"{budget_of(config, step)}, or checkpoint.load=weights to begin at step 0 with its parameters."
    )


def checkpoints_of(setting: str, run: str) -> CheckpointPath:
    """Where the checkpoints of a run are: of its folder, or under a URL.

    Args:
        setting: what to call the origin of the run in an error.
        run: folder or URL.

    Raises:
        UserError: the URL cannot be used.
    """
    return locate(setting, run) if is_url(run) else RunFolder(Path(run)).checkpoints_dir


def refuse_all_corrupt(folder: RunFolder) -> None:
    """Assert that a run without a checkpoint has lost none.

    Raises:
        UserError: all that it had were corrupt; to begin again at step 0 is not ours to decide.
    """
    corrupt = list_folders(folder.corrupt_dir)
    if corrupt and folder.newest_checkpoint() is None:
        reasons = {event.get("path"): event.get("reason") for event in read_events(folder.path)}
        described = "; ".join(f"{path.name}: {reasons.get(str(path), 'corrupt')}" for path in corrupt)
        raise UserError(
            f"{folder.path} has no checkpoint left, only corrupt ones that were moved to {folder.corrupt_dir} "
            f"({described}); restore one of them to {folder.checkpoints_dir} from a copy, or delete "
            f"{folder.corrupt_dir} to begin at step 0."
        )
