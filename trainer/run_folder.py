"""A run's folder: where everything about a run is kept, and what a continued run must not change."""

import contextlib
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from sharding.errors import UserError
from trainer.atomic_files import create_once, write_atomically
from trainer.checkpoint.layout import check_sizes
from trainer.checkpoint.manifest import read_manifest
from trainer.checkpoint.storage import (
    CheckpointPath,
    checkpoint_folder,
    list_checkpoints,
    list_folders,
    locate,
)
from trainer.config import RunConfig, config_to_yaml, load_config, load_frozen_config, parse_config
from trainer.events import read_events
from trainer.failure import set_failure_aside
from trainer.frozen_config import all_differences, frozen_differences
from trainer.goodput import write_goodput
from trainer.goodput_ledger import begin_ledger, begins_by_hand
from trainer.lease import LEASE_VARIABLE, is_taken_over, record_attempt
from trainer.outages import cannot_be_written
from trainer.provenance import collect_provenance
from trainer.secrets import blot_out_values
from trainer.validation import World

_CHECKPOINTS = "checkpoints"
_MIN_FREE_BYTES = 16 * 2**20
_RESERVE_BYTES = 64 * 2**10


class RunFolder:
    """The folder ``output_dir/name`` of one run."""

    def __init__(self, path: Path, checkpoints_dir: CheckpointPath | None = None) -> None:
        """Name a folder; nothing is read or created yet.

        Args:
            path: the folder.
            checkpoints_dir: where checkpoints go; if not given, where the latest attempt's configuration says.
        """
        self.path = path
        self._checkpoints_dir = checkpoints_dir
        self.config_file = path / "config.yaml"
        self.metrics_file = path / "metrics.jsonl"
        self.stop_file = path / "stop"
        self.outcome_file = path / "outcome.json"
        self.report_file = path / "report.html"
        self._reserve_file = path / ".reserve"
        # Of the lease that this process writes under; a rank has its launcher's. None: nobody else is expected.
        self.lease_token = os.environ.get(LEASE_VARIABLE)

    @classmethod
    def of(cls, config: RunConfig) -> "RunFolder":
        """The folder of the run that a configuration describes.

        Raises:
            UserError: checkpoint.storage cannot be used.
        """
        return cls(config.run_dir, _checkpoints_place(config.run_dir, config.checkpoint.storage, config.name))

    @property
    def checkpoints_dir(self) -> CheckpointPath:
        """Where checkpoints lie.

        Raises:
            UserError: the run's checkpoint.storage cannot be used.
        """
        if self._checkpoints_dir is None and self.config_file.exists():
            self._checkpoints_dir = self._frozen_checkpoints_dir()
        return self._checkpoints_dir or self.path / _CHECKPOINTS

    @property
    def damaged_dir(self) -> CheckpointPath:
        """Where damaged checkpoints are moved to."""
        return self.checkpoints_dir / "damaged"

    @property
    def is_taken_over(self) -> bool:
        """Whether the folder's writer is now another than the one that this process belongs to."""
        return is_taken_over(self.path, self.lease_token)

    def log_dir(self, attempt: int) -> Path:
        """Where the logs of one attempt go."""
        return self.path / "logs" / f"attempt-{attempt}"

    def checkpoint_path(self, step: int) -> CheckpointPath:
        """The folder of the checkpoint after a step."""
        return checkpoint_folder(self.checkpoints_dir, step)

    def newest_checkpoint(self, last_step: int | None = None) -> tuple[int, CheckpointPath] | None:
        """Step and folder of the newest checkpoint, up to a step if given; one without a manifest does not exist."""
        found = [item for item in list_checkpoints(self.checkpoints_dir) if last_step is None or item[0] <= last_step]
        return found[-1] if found else None

    def frozen_config(self) -> RunConfig:
        """The configuration that the run was first started with.

        Raises:
            UserError: there is no run in this folder.
        """
        if not self.config_file.exists():
            raise UserError(f"{self.path} is not a run folder: it has no config.yaml; check the path.")
        return load_frozen_config(self.config_file)

    def newest_attempt(self) -> int:
        """Number of the latest attempt, from 1; 0 where there was none."""
        return max((_number(folder) or 0 for folder in (self.path / "logs").glob("attempt-*")), default=0)

    def _next_attempt(self) -> int:
        """A number that no attempt has had, also where somebody has cleared the logs away."""
        frozen = (_number(file.with_suffix("")) or 0 for file in self.path.glob("config.attempt-*.yaml"))
        first = 1 if self.config_file.exists() and self.newest_checkpoint() is not None else 0
        return max(self.newest_attempt(), first, *frozen) + 1

    def newest_config(self) -> RunConfig:
        """The configuration of the latest attempt that froze one.

        Raises:
            UserError: there is no run in this folder.
        """
        for attempt in range(self.newest_attempt(), 1, -1):
            if (file := self.attempt_config_file(attempt)).exists():
                return load_frozen_config(file)
        return self.frozen_config()

    def attempt_config_file(self, attempt: int) -> Path:
        """The file with the configuration that an attempt was begun with, which its ranks read."""
        return self.config_file if attempt == 1 else self.path / f"config.attempt-{attempt}.yaml"

    def check_attempt_config(self, config: RunConfig, attempt: int) -> None:
        """Assert that an attempt's rank has been given the configuration that the attempt was begun with.

        Raises:
            UserError: it has another.
        """
        file = self.attempt_config_file(attempt)
        if differences := all_differences(load_config(file), config):
            raise UserError(
                f"attempt {attempt} of {self.path} was begun with other settings than this rank was given "
                f"({'; '.join(differences)}); ranks must be given {file}."
            )

    def is_complete(self, config: RunConfig) -> bool:
        """Whether the newest checkpoint is at or beyond the last step, and whole as far as sizes tell.

        What files contain is compared by the ranks and by ``shardline checkpoint verify``.
        """
        newest = self.newest_checkpoint()
        if newest is None or newest[0] < config.num_steps:
            return False
        try:
            check_sizes(newest[1], read_manifest(newest[1]))
        except UserError:
            # The ranks know what to do about it.
            return False
        return True

    def check_damaged(self) -> None:
        """Assert that a run without a checkpoint has lost none.

        Raises:
            UserError: all that it had were damaged; to begin again at step 0 is not ours to decide.
        """
        damaged = list_folders(self.damaged_dir)
        if damaged and self.newest_checkpoint() is None:
            reasons = {event.get("path"): event.get("reason") for event in read_events(self.path)}
            described = "; ".join(f"{path.name}: {reasons.get(str(path), 'damaged')}" for path in damaged)
            raise UserError(
                f"{self.path} has no checkpoint left, only damaged ones that were moved to {self.damaged_dir} "
                f"({described}); restore one of them to {self.checkpoints_dir} from a copy, or delete "
                f"{self.damaged_dir} to begin at step 0."
            )

    def check(self, config: RunConfig) -> None:
        """Check that a run with this configuration may go on in this folder; changes nothing.

        Raises:
            UserError: a frozen setting differs, the budget ends below the newest checkpoint, the folder may not be
                continued, cannot be written, or has no space.
        """
        self._check_space()
        newest = self.newest_checkpoint()
        self._check_same_storage(newest)
        if newest is None:
            self.check_damaged()
            # Nothing to continue: whoever mends a mistake in the settings of a first attempt may start over here.
            return
        self._check_frozen(config)
        if config.checkpoint.resume == "never":
            raise UserError(
                f"checkpoint.resume=never, but {self.path} has a checkpoint of step {newest[0]}; choose another name "
                "or checkpoint.resume=auto."
            )
        if config.num_steps < newest[0]:
            key, unit, size = "steps", 1, ""
            if config.tokens is not None:
                key, unit, size = "tokens", config.tokens_per_step, f" of {config.tokens_per_step} tokens"
            raise UserError(
                f"{key}={getattr(config, key)} is less than the {newest[0]} steps{size} that {self.path} has done; "
                f"set {key} to at least {newest[0] * unit}."
            )

    def begin_attempt(self, config: RunConfig, world: World, argv: list[str]) -> int:
        """Start the first or a further attempt: freeze its configuration and provenance, clear old requests.

        The caller holds the folder's lease.

        Returns:
            The attempt's number, from 1.

        Raises:
            UserError: see ``check``; also where the folder cannot be written.
            StorageOutage: it cannot be written for now.
        """
        began_at = time.time()
        self.check(config)
        try:
            attempt = self._next_attempt()
            self.log_dir(attempt).mkdir(parents=True)
            by_hand = begins_by_hand(self.path, attempt, os.environ)
            begin_ledger(self.log_dir(attempt), attempt, began_at, by_hand=by_hand)
            suffix = "" if attempt == 1 else f".attempt-{attempt}"
            if self.newest_checkpoint() is None or not self.config_file.exists():
                write_atomically(self.config_file, config_to_yaml(config))
            if attempt > 1:
                write_atomically(self.attempt_config_file(attempt), config_to_yaml(config))
            provenance = blot_out_values(collect_provenance(config, world, argv), os.environ)
            # It holds uncommitted changes of the code, in which there may be what no rule finds.
            text = json.dumps(provenance, indent=2) + "\n"
            write_atomically(self.path / f"provenance{suffix}.json", text, owner_only=True)
            self.stop_file.unlink(missing_ok=True)
            self.outcome_file.unlink(missing_ok=True)
            set_failure_aside(self.path)
            record_attempt(self.path, attempt)
            write_goodput(self.path)
            # Room to say how the attempt ended, should the disk be full by then.
            write_atomically(self._reserve_file, bytes(_RESERVE_BYTES))
        except OSError as error:
            raise cannot_be_written("run folder", self.path, error) from None
        return attempt

    def write_outcome(self, status: str, exit_code: int, step: int, reason: str, rank: int | None = None) -> bool:
        """Say how the attempt ended, unless a rank has said so before: the first to fail knows best.

        Whoever has lost the folder stays silent: it would speak for the new owner's attempt.

        Returns:
            Whether this call has said it.
        """
        if self.is_taken_over:
            return False
        outcome = {"status": status, "exit_code": exit_code, "step": step, "reason": reason, "rank": rank}
        try:
            return create_once(self.outcome_file, json.dumps(outcome) + "\n")
        except OSError as error:
            self._reserve_file.unlink(missing_ok=True)
            try:
                return create_once(self.outcome_file, json.dumps(outcome) + "\n")
            except OSError:
                print(f"warning: {self.outcome_file} cannot be written: {error.strerror}", file=sys.stderr)
                return False

    def replace_outcome(self, status: str, exit_code: int, step: int, reason: str, rank: int | None = None) -> None:
        """Say how the run ended where that is another thing than how its last attempt did."""
        if self.is_taken_over:
            return
        self.outcome_file.unlink(missing_ok=True)
        self.write_outcome(status, exit_code, step, reason, rank)

    def read_outcome(self) -> dict[str, Any] | None:
        """How the last attempt ended; None where nobody could say."""
        try:
            return json.loads(self.outcome_file.read_text())
        except (OSError, ValueError):
            return None

    def _frozen_checkpoints_dir(self) -> CheckpointPath:
        try:
            config = self.newest_config()
        except UserError:
            # No run yet, or settings that only another release understands.
            return self.path / _CHECKPOINTS
        return _checkpoints_place(self.path, config.checkpoint.storage, config.name)

    def _check_same_storage(self, newest: tuple[int, CheckpointPath] | None) -> None:
        """Assert that no checkpoint is forgotten because checkpoint.storage has changed."""
        before = self._frozen_checkpoints_dir()
        if str(before) == str(self.checkpoints_dir):
            return
        left = list_checkpoints(before)
        if left and (newest is None or newest[0] < left[-1][0]):
            raise UserError(
                f"checkpoint.storage: the newest checkpoint in {self.checkpoints_dir} is of step "
                f"{0 if newest is None else newest[0]}, but this run has one of step {left[-1][0]} in {before}; copy "
                "it there, or set checkpoint.storage back."
            )

    def _config_of_checkpoints(self) -> RunConfig:
        """The frozen configuration; what checkpoints in a storage say where this folder is new, on another machine."""
        if not self.config_file.exists():
            for _, folder in reversed(list_checkpoints(self.checkpoints_dir)):
                with contextlib.suppress(UserError):
                    return parse_config(read_manifest(folder).config, source=str(folder), has_rules=False)
        return self.frozen_config()

    def _check_space(self) -> None:
        try:
            existing = next(p for p in (self.path, *self.path.absolute().parents) if p.exists())
            free_bytes = shutil.disk_usage(existing).free
        except OSError as error:
            raise UserError(
                f"run folder {self.path} cannot be used: {error.strerror}; choose another output_dir."
            ) from None
        if not existing.is_dir():
            raise UserError(f"run folder {self.path} cannot be made: {existing} is a file; choose another output_dir.")
        if not os.access(existing, os.W_OK):
            raise UserError(
                f"run folder {self.path} cannot be written: {existing} is read-only for you; choose another output_dir."
            )
        if free_bytes < _MIN_FREE_BYTES:
            raise UserError(
                f"run folder {self.path}: its disk has {free_bytes:,} bytes free, which is less than the "
                f"{_MIN_FREE_BYTES:,} that logs alone may need; free some space or choose another output_dir."
            )

    def _check_frozen(self, config: RunConfig) -> None:
        differences = frozen_differences(self._config_of_checkpoints(), config)
        if differences:
            raise UserError(
                f"{self.path} holds a run with other settings ({'; '.join(differences)}); "
                f"choose another name, or start one from it with checkpoint.from={self.path}."
            )


def _checkpoints_place(run_dir: Path, storage: str | None, name: str) -> CheckpointPath:
    return run_dir / _CHECKPOINTS if storage is None else locate("checkpoint.storage", storage) / name


def _number(folder: Path) -> int | None:
    """The number at the end of ``step-00000010`` or ``attempt-2``; None for a folder that somebody named otherwise."""
    digits = folder.name.rpartition("-")[2]
    return int(digits) if digits.isdecimal() else None
