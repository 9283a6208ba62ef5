"""A run's folder: where everything about a run is kept, and how an attempt says how it ended."""

import json
import os
from pathlib import Path
from typing import Any

from sharding.ranks.errors import UserError
from sharding.ranks.sentences import print_warning
from trainer.config import RunConfig, load_config, load_frozen_config
from trainer.config.frozen_config import all_differences
from trainer.files.atomic_files import create_once, write_atomically
from trainer.files.storage import CheckpointPath, locate
from trainer.run_folder.lease import is_taken_over
from trainer.run_folder.listing import CORRUPT_FOLDER, checkpoint_folder, list_checkpoints
from trainer.runtime.processes import LEASE_VARIABLE

_CHECKPOINTS = "checkpoints"
_MIN_FREE_BYTES = 16 * 2**20
RESERVE_BYTES = 64 * 2**10


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
        self.reserve_file = path / ".reserve"
        # The lease that this process writes under, a rank its launcher's; None where nobody else is expected.
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
            self._checkpoints_dir = self.frozen_checkpoints_dir()
        return self._checkpoints_dir or self.path / _CHECKPOINTS

    @property
    def corrupt_dir(self) -> CheckpointPath:
        """Where corrupt checkpoints are moved to."""
        return self.checkpoints_dir / CORRUPT_FOLDER

    @property
    def is_taken_over(self) -> bool:
        """Whether the folder's writer is now another than the one that this process belongs to."""
        return is_taken_over(self.path, self.lease_token)

    def request_stop(self, reason: str) -> None:
        """Ask the run to save and stop at the next step's edge."""
        write_atomically(self.stop_file, reason + "\n")

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

    def next_attempt(self) -> int:
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
            self.reserve_file.unlink(missing_ok=True)
            try:
                return create_once(self.outcome_file, json.dumps(outcome) + "\n")
            except OSError:
                print_warning(f"{self.outcome_file} cannot be written: {error.strerror}")
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

    def frozen_checkpoints_dir(self) -> CheckpointPath:
        """Where the latest attempt's configuration says that checkpoints lie."""
        try:
            config = self.newest_config()
        except UserError:
            # No run yet, or settings that only another release understands.
            return self.path / _CHECKPOINTS
        return _checkpoints_place(self.path, config.checkpoint.storage, config.name)


def _checkpoints_place(run_dir: Path, storage: str | None, name: str) -> CheckpointPath:
    return run_dir / _CHECKPOINTS if storage is None else locate("checkpoint.storage", storage) / name


def _number(folder: Path) -> int | None:
    """The number at the end of ``step-00000010`` or ``attempt-2``; None for a folder that somebody named otherwise."""
    digits = folder.name.rpartition("-")[2]
    return int(digits) if digits.isdecimal() else None
