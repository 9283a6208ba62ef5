"""When a run saves, what it keeps, and what it starts from."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from sharding.engine import Engine
from sharding.errors import UserError
from sharding.process_group import Ranks
from trainer.checkpoint.manifest import TrainingState
from trainer.checkpoint.reader import CheckpointReader
from trainer.checkpoint.writer import (
    CheckpointIdentity,
    prune_checkpoints,
    remove_checkpoints_after,
    save_checkpoint,
)
from trainer.config import RunConfig
from trainer.run_folder import RunFolder
from trainer.weight_average import WeightAverage


class Checkpointer:
    """Saves one run's state, and finds the state it starts from."""

    def __init__(
        self,
        config: RunConfig,
        run_folder: RunFolder,
        data_fingerprint: str,
        ranks: Ranks,
        before_commit: Callable[[], None],
        weight_average: WeightAverage | None = None,
    ) -> None:
        """Bind to a run.

        Args:
            config: the run's configuration.
            run_folder: where checkpoints go.
            data_fingerprint: identity of the prepared corpus.
            ranks: this rank's place.
            before_commit: called on rank 0 before a checkpoint is made valid; raises if the folder was lost.
            weight_average: is saved and loaded with the engine's state.
        """
        self._config = config
        self._run_folder = run_folder
        self._data_fingerprint = data_fingerprint
        self._ranks = ranks
        self._before_commit = before_commit
        self._weight_average = weight_average
        self._saved_step: int | None = None

    def resume(self, engine: Engine) -> TrainingState | None:
        """Load the state that the run continues, forks or warm-starts from; None where it starts from nothing.

        Raises:
            UserError: a checkpoint is damaged, or of another model or corpus.
        """
        source, weights_only = self._agree_on(self._choose_source)
        if source is None:
            return None
        training = self._load(engine, source, weights_only)
        if weights_only:
            return None
        if source.parent == self._run_folder.checkpoints_dir:
            self._saved_step = training.step
        return training

    def roll_back(self, engine: Engine, last_step: int) -> TrainingState | None:
        """Load the run's newest checkpoint of ``last_step`` or before, and remove those after it.

        Returns:
            What training continues from; None, and nothing has changed, where there is no such checkpoint.

        Raises:
            UserError: the checkpoint is damaged.
        """
        source, _ = self._agree_on(lambda: (self._newest_until(last_step), False))
        if source is None:
            return None
        training = self._load(engine, source, weights_only=False)
        if self._ranks.rank == 0:
            # They are of a training that did not happen: were the run killed now, it must not continue from them.
            remove_checkpoints_after(self._run_folder.checkpoints_dir, training.step)
        self._saved_step = training.step
        return training

    def _load(self, engine: Engine, source: Path, weights_only: bool) -> TrainingState:
        reader = CheckpointReader(source)
        # Each rank hashes its share of the files; a damaged one ends the start for all.
        reader.verify(sorted(reader.manifest.files)[self._ranks.rank :: self._ranks.world_size])
        if not weights_only and reader.manifest.data_fingerprint != self._data_fingerprint:
            raise UserError(
                f"checkpoint {source} was trained on another corpus (fingerprint "
                f"{reader.manifest.data_fingerprint[:12]}, now {self._data_fingerprint[:12]}): its position in the "
                "data has no meaning here; restore the corpus, or start another run with checkpoint.from and "
                "checkpoint.load=weights."
            )
        engine.load_state(reader.read_into, with_optimizer=not weights_only)
        if self._weight_average is not None:
            # A run that turns averaging on begins with the weights it has.
            continues = reader.has_average and not weights_only
            self._weight_average.load(reader.read_into if continues else None)
        return reader.manifest.training

    def save(self, engine: Engine, training: TrainingState) -> Path | None:
        """Save all state, then delete what is not to be kept; None if this step is saved already.

        Raises:
            UserError: a rank could not write.
        """
        if self._saved_step == training.step:
            return None
        folder = self._run_folder.checkpoint_path(training.step)
        identity = CheckpointIdentity(
            config=self._config.model_dump(mode="json"),
            data_fingerprint=self._data_fingerprint,
            strategy=self._config.parallel.strategy,
        )
        slices = engine.state(with_optimizer=True)
        if self._weight_average is not None:
            slices += self._weight_average.state()
        save_checkpoint(folder, slices, training, identity, self._ranks, self._before_commit)
        self._saved_step = training.step
        if self._ranks.rank == 0:
            settings = self._config.checkpoint
            prune_checkpoints(self._run_folder.checkpoints_dir, settings.keep_last, settings.keep_every)
        return folder

    def _agree_on(self, choose: Callable[[], tuple[Path | None, bool]]) -> tuple[Path | None, bool]:
        """Rank 0 chooses, since a shared file system may show ranks different listings."""
        choice: list[Any] = [None, False]
        if self._ranks.rank == 0:
            choice = list(choose())
        if self._ranks.world_size > 1:
            dist.broadcast_object_list(choice, src=0)
        return choice[0], choice[1]

    def _newest_until(self, last_step: int) -> Path | None:
        newest = self._run_folder.newest_checkpoint(last_step)
        return newest[1] if newest is not None else None

    def _choose_source(self) -> tuple[Path | None, bool]:
        newest = self._run_folder.newest_checkpoint()
        if newest is not None:
            return newest[1], False
        settings = self._config.checkpoint
        if settings.from_ is None:
            return None, False
        return resolve_checkpoint(settings.from_), settings.load == "weights"


def resolve_checkpoint(reference: str) -> Path:
    """The checkpoint folder that ``RUN_FOLDER`` (its newest) or ``RUN_FOLDER@STEP`` names.

    Raises:
        UserError: there is no such run or checkpoint.
    """
    folder_text, separator, step_text = reference.rpartition("@")
    if not separator:
        folder_text = reference
    folder = RunFolder(Path(folder_text))
    if separator:
        if not step_text.isdigit():
            raise UserError(f"checkpoint.from={reference}: {step_text!r} is not a step; write RUN_FOLDER@STEP.")
        path = folder.checkpoint_path(int(step_text))
        if not (path / "manifest.json").exists():
            raise UserError(f"checkpoint.from={reference}: there is no checkpoint {path}; name another step.")
        return path
    newest = folder.newest_checkpoint()
    if newest is None:
        raise UserError(f"checkpoint.from={reference}: {folder_text} has no checkpoint; name another run folder.")
    return newest[1]
