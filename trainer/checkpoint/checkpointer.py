"""When a run saves, what it keeps, and what it starts from."""

from collections.abc import Callable
from pathlib import Path

from sharding.engine import Engine
from sharding.errors import UserError
from sharding.process_group import Ranks
from trainer.checkpoint.manifest import TrainingState
from trainer.checkpoint.source import Source, open_source
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
        warn: Callable[[str], None] = print,
    ) -> None:
        """Bind to a run.

        Args:
            config: the run's configuration.
            run_folder: where checkpoints go.
            data_fingerprint: identity of the prepared corpus.
            ranks: this rank's place.
            before_commit: called on rank 0 before a checkpoint is made valid; raises if the folder was lost.
            weight_average: is saved and loaded with the engine's state.
            warn: tells a person that a checkpoint is damaged; called on rank 0.
        """
        self._config = config
        self._run_folder = run_folder
        self._data_fingerprint = data_fingerprint
        self._ranks = ranks
        self._before_commit = before_commit
        self._weight_average = weight_average
        self._warn = warn
        self._saved_step: int | None = None

    def resume(self, engine: Engine) -> TrainingState | None:
        """Load the state that the run continues, forks or warm-starts from; None where it starts from nothing.

        Of the run's own checkpoints the newest one that is whole is taken; see ``open_source``.

        Raises:
            UserError: a checkpoint is of another model or corpus, or none is whole.
        """
        source = self._open(None)
        if source is None:
            return None
        training = self._load(engine, source)
        if source.weights_only:
            return None
        if source.is_own:
            self._saved_step = training.step
        return training

    def roll_back(self, engine: Engine, last_step: int) -> TrainingState | None:
        """Load the run's newest whole checkpoint of ``last_step`` or before, and remove those after it.

        Returns:
            What training continues from; None, and nothing has changed, where there is no such checkpoint.
        """
        source = self._open(last_step)
        if source is None:
            return None
        training = self._load(engine, source)
        if self._ranks.rank == 0:
            # They are of a training that did not happen: were the run killed now, it must not continue from them.
            remove_checkpoints_after(self._run_folder.checkpoints_dir, training.step)
        self._saved_step = training.step
        return training

    def _open(self, last_step: int | None) -> Source | None:
        settings = self._config.checkpoint
        return open_source(settings, self._run_folder, self._ranks, self._before_commit, self._warn, last_step)

    def _load(self, engine: Engine, source: Source) -> TrainingState:
        reader, weights_only = source.reader, source.weights_only
        if not weights_only and reader.manifest.data_fingerprint != self._data_fingerprint:
            raise UserError(
                f"checkpoint {reader.folder} was trained on another corpus (fingerprint "
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
