"""Whether a run may go on in its folder, and the beginning of each attempt; imports no torch."""

import contextlib
import json
import os
import shutil
import time

from sharding.ranks.errors import UserError
from trainer.checkpoint.base_manifest import check_base_sizes
from trainer.checkpoint.finish import finish_reason
from trainer.checkpoint.layout import check_sizes
from trainer.checkpoint.manifest import read_manifest
from trainer.checkpoint.reference import refuse_all_corrupt
from trainer.checkpoint.training_state import TrainingState
from trainer.config import RunConfig, config_to_yaml, parse_config
from trainer.config.budget import budget, budget_of
from trainer.config.frozen_config import frozen_differences
from trainer.config.rules import World
from trainer.config.secrets import redact_values
from trainer.faults.failure.record import set_failure_aside
from trainer.files.atomic_files import write_atomically
from trainer.files.outages import cannot_be_written
from trainer.files.storage import CheckpointPath
from trainer.metrics.goodput import write_goodput
from trainer.metrics.goodput_ledger import begin_ledger, begins_by_hand
from trainer.run_folder.folder import RESERVE_BYTES, RunFolder
from trainer.run_folder.lease import record_attempt
from trainer.run_folder.listing import list_checkpoints
from trainer.run_folder.provenance import collect_provenance, provenance_file

_MIN_FREE_BYTES = 16 * 2**20


def check_continuation(folder: RunFolder, config: RunConfig) -> None:
    """Check that a run with this configuration may go on in this folder; changes nothing.

    Raises:
        UserError: a frozen setting differs, the budget ends below the newest checkpoint, the folder may not be
            continued, cannot be written, or has no space.
    """
    _check_space(folder)
    newest = folder.newest_checkpoint()
    _check_same_storage(folder, newest)
    if newest is None:
        refuse_all_corrupt(folder)
        # Nothing to continue: whoever mends a mistake in the settings of a first attempt may start over here.
        return
    _check_frozen(folder, config)
    if config.checkpoint.resume == "never":
        raise UserError(
            f"checkpoint.resume=never, but {folder.path} has a checkpoint of step {newest[0]}; choose another name "
            "or checkpoint.resume=auto."
        )
    if config.stages and config.num_steps < newest[0]:
        raise UserError(
            f"the stages come to {config.num_steps} steps, less than the {newest[0]} that {folder.path} has done; "
            "lengthen the last one."
        )
    if config.is_length_known and config.num_steps < newest[0]:
        key, value = budget(config)
        raise UserError(
            f"{key}={value} is less than the {newest[0]} steps that {folder.path} has done; set {key} to at least "
            f"{budget_of(config, newest[0])}."
        )


def begin_attempt(folder: RunFolder, config: RunConfig, world: World, argv: list[str]) -> int:
    """Start the first or a further attempt: freeze its configuration and provenance, clear old requests.

    The caller holds the folder's lease.

    Returns:
        The attempt's number, from 1.

    Raises:
        UserError: see ``check_continuation``; also where the folder cannot be written.
        StorageOutage: it cannot be written for now.
    """
    began_at = time.time()
    check_continuation(folder, config)
    try:
        attempt = folder.next_attempt()
        folder.log_dir(attempt).mkdir(parents=True)
        by_hand = begins_by_hand(folder.path, attempt, os.environ)
        begin_ledger(folder.log_dir(attempt), attempt, began_at, by_hand=by_hand)
        freeze_config(folder, config, attempt)
        provenance = redact_values(collect_provenance(config, world, argv), os.environ)
        # It holds uncommitted changes of the code, in which there may be what no rule finds.
        text = json.dumps(provenance, indent=2) + "\n"
        write_atomically(provenance_file(folder.path, attempt), text, owner_only=True)
        folder.stop_file.unlink(missing_ok=True)
        folder.outcome_file.unlink(missing_ok=True)
        set_failure_aside(folder.path)
        record_attempt(folder.path, attempt)
        write_goodput(folder.path)
        # Room to say how the attempt ended, should the disk be full by then.
        write_atomically(folder.reserve_file, bytes(RESERVE_BYTES))
    except OSError as error:
        raise cannot_be_written("run folder", folder.path, error) from None
    return attempt


def freeze_config(folder: RunFolder, config: RunConfig, attempt: int) -> None:
    """Write down what an attempt is begun with: once more where only the corpus has told how long it is.

    Raises:
        UserError: it cannot be written.
        StorageOutage: it cannot be written for now.
    """
    try:
        if folder.newest_checkpoint() is None or not folder.config_file.exists():
            write_atomically(folder.config_file, config_to_yaml(config))
        if attempt > 1:
            write_atomically(folder.attempt_config_file(attempt), config_to_yaml(config))
    except OSError as error:
        raise cannot_be_written("run folder", folder.path, error) from None


def finished(folder: RunFolder, config: RunConfig) -> tuple[TrainingState, CheckpointPath, str] | None:
    """State and folder of the newest checkpoint, and why nothing is left to train after it; None while something is.

    A checkpoint counts that is complete as far as sizes tell.
    What files contain is compared by the ranks and by ``shardline checkpoint verify``.
    """
    newest = folder.newest_checkpoint()
    if newest is None:
        return None
    try:
        manifest = read_manifest(newest[1])
        reason = finish_reason(manifest.training, config)
        if reason is not None:
            check_sizes(newest[1], manifest.files)
            if manifest.base is not None:
                check_base_sizes(newest[1], manifest.base)
    except UserError:
        # The ranks know what to do about it.
        return None
    return None if reason is None else (manifest.training, newest[1], reason)


def _check_same_storage(folder: RunFolder, newest: tuple[int, CheckpointPath] | None) -> None:
    """Assert that no checkpoint is forgotten because checkpoint.storage has changed."""
    before = folder.frozen_checkpoints_dir()
    if str(before) == str(folder.checkpoints_dir):
        return
    left = list_checkpoints(before)
    if left and (newest is None or newest[0] < left[-1][0]):
        raise UserError(
            f"checkpoint.storage: the newest checkpoint in {folder.checkpoints_dir} is of step "
            f"{0 if newest is None else newest[0]}, but this run has one of step {left[-1][0]} in {before}; copy "
            "it there, or set checkpoint.storage back."
        )


def _config_of_checkpoints(folder: RunFolder) -> RunConfig:
    """That of the latest attempt; what checkpoints in a storage say where this folder is new, on another machine."""
    if not folder.config_file.exists():
        for _, checkpoint in reversed(list_checkpoints(folder.checkpoints_dir)):
            with contextlib.suppress(UserError):
                return parse_config(read_manifest(checkpoint).config, source=str(checkpoint), has_rules=False)
    return folder.newest_config()


def _check_space(folder: RunFolder) -> None:
    try:
        existing = next(p for p in (folder.path, *folder.path.absolute().parents) if p.exists())
        free_bytes = shutil.disk_usage(existing).free
    except OSError as error:
        raise UserError(
            f"run folder {folder.path} cannot be used: {error.strerror}; choose another output_dir."
        ) from None
    if not existing.is_dir():
        raise UserError(f"run folder {folder.path} cannot be made: {existing} is a file; choose another output_dir.")
    if not os.access(existing, os.W_OK):
        raise UserError(
            f"run folder {folder.path} cannot be written: {existing} is read-only for you; choose another output_dir."
        )
    if free_bytes < _MIN_FREE_BYTES:
        raise UserError(
            f"run folder {folder.path}: its disk has {free_bytes:,} bytes free, which is less than the "
            f"{_MIN_FREE_BYTES:,} that logs alone may need; free some space or choose another output_dir."
        )


def _check_frozen(folder: RunFolder, config: RunConfig) -> None:
    differences = frozen_differences(_config_of_checkpoints(folder), config)
    if differences:
        described = "; ".join(f"{change.key}: frozen {change.old}, now {change.new}" for change in differences)
        settings = [*config.checkpoint.allow_changes, *(change.setting for change in differences)]
        keys = ", ".join(dict.fromkeys(settings))
        allow = f", or allow the change with checkpoint.allow_changes='[{keys}]'"
        raise UserError(
            f"{folder.path} holds a run with other settings ({described}); "
            f"choose another name, or start one from it with checkpoint.from={folder.path}"
            f"{allow if all(change.can_be_allowed for change in differences) else ''}."
        )
