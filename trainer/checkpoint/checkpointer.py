"""When a run saves, what it keeps, and what it starts from."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from sharding.engine import Engine
from sharding.part import Part
from sharding.precision import compute_dtype
from sharding.ranks.errors import UserError
from sharding.ranks.process_group import Ranks
from sharding.state import MODEL_PREFIX, frozen_names
from trainer.checkpoint.background import BackgroundWrite
from trainer.checkpoint.base import BaseKeeper
from trainer.checkpoint.changes import record_changes, say_other_precision
from trainer.checkpoint.manifest import PRECISION_RULE
from trainer.checkpoint.rank_file import RankReport, write_rank_file
from trainer.checkpoint.reader import CheckpointReader
from trainer.checkpoint.reference import check_fork
from trainer.checkpoint.retention import BackgroundPruning, remove_checkpoints_after
from trainer.checkpoint.snapshot import Snapshot
from trainer.checkpoint.source import Source, on_rank_0, open_source
from trainer.checkpoint.tokenizer_archive import TokenizerArchive
from trainer.checkpoint.training_state import TrainingState
from trainer.checkpoint.writer import CheckpointIdentity, commit_checkpoint, prepare_checkpoint
from trainer.config import RunConfig
from trainer.data.rows_manifest import RECIPE_NAME, RowRecipe
from trainer.files.storage import CheckpointPath
from trainer.optimizers.pruning import Pruning
from trainer.optimizers.weight_average import WeightAverage
from trainer.run_folder.folder import RunFolder


@dataclass(frozen=True)
class _PendingSave:
    """A checkpoint without a manifest yet."""

    folder: CheckpointPath
    training: TrainingState
    identity: CheckpointIdentity
    write: BackgroundWrite


class Checkpointer:
    """Saves one run's state, and finds the state it starts from."""

    def __init__(
        self,
        config: RunConfig,
        run_folder: RunFolder,
        data_fingerprint: Callable[[int], str],
        ranks: Ranks,
        before_commit: Callable[[], None],
        weight_average: WeightAverage | None = None,
        tokenizer: TokenizerArchive | None = None,
        recipe: RowRecipe | None = None,
        begin_corpus: Callable[[CheckpointReader], TrainingState] | None = None,
        check_model_of_fork: Callable[[CheckpointReader], None] = lambda _: None,
        fit_weights: Callable[[CheckpointReader], Mapping[str, str | None]] = lambda _: {},
        inform: Callable[[str], None] = print,
        warn: Callable[[str], None] = print,
        notify: Callable[[int, CheckpointPath], None] = lambda _step, _folder: None,
        before_write: Callable[[int], None] = lambda _: None,
        pruning: Pruning | None = None,
    ) -> None:
        """Bind to a run.

        Args:
            config: the run's configuration.
            run_folder: where checkpoints go.
            data_fingerprint: identity of the prepared corpus that a step is trained on.
            ranks: this rank's place.
            before_commit: called on rank 0 before a checkpoint is made valid, removed or moved; raises if the folder
                was lost.
            weight_average: is saved and loaded with the engine's state.
            tokenizer: is saved beside it, by rank 0.
            recipe: how rows are read; is saved beside it, by rank 0.
            begin_corpus: called on every rank with another run's checkpoint that was trained on another corpus; raises
                if this one does not fit, and gives the state at its beginning.
            check_model_of_fork: called on every rank with another run's checkpoint of which all is to be loaded;
                raises if this run would make another model of it.
            fit_weights: called on every rank with another run's checkpoint whose weights alone are to be loaded; raises
                if they do not fit, and names the tensors that have another name there, with that, and those that keep
                their initial values, with None.
            inform: tells a person what the run does otherwise than its checkpoint; called on rank 0.
            warn: tells a person that a checkpoint is corrupt; called on rank 0.
            notify: called with step and folder of a checkpoint once it is complete, on rank 0.
            before_write: called with the step where this rank begins to write, in the thread that writes.
            pruning: its masks are saved and loaded with the engine's state.
        """
        self._config = config
        self._run_folder = run_folder
        self._data_fingerprint = data_fingerprint
        self._ranks = ranks
        self._before_commit = before_commit
        self._weight_average = weight_average
        self._warn, self._inform = warn, inform
        self._notify = notify
        self._begin_corpus = begin_corpus
        self._check_model_of_fork = check_model_of_fork
        self._fit_weights = fit_weights
        self._before_write = before_write
        self._weight_pruning = pruning
        self._identity = CheckpointIdentity(
            config=config.model_dump(mode="json"),
            data_fingerprint="",
            strategy=config.parallel.strategy,
            tokenizer=None if tokenizer is None else tokenizer.entry,
            recipe_file=None if recipe is None else RECIPE_NAME,
            precision_rule=None if compute_dtype(config.precision, ranks.device).itemsize == 4 else PRECISION_RULE,
        )
        self._attachments: dict[str, bytes] = {}
        if ranks.rank == 0:
            if tokenizer is not None:
                self._attachments[tokenizer.entry.file] = tokenizer.contents
            if recipe is not None:
                self._attachments[RECIPE_NAME] = recipe.model_dump_json(indent=1).encode()
        self._snapshot = Snapshot()
        self._pruning = BackgroundPruning(warn, before_commit)
        self._base = BaseKeeper(run_folder.checkpoints_dir, ranks, before_commit)
        self._pending: _PendingSave | None = None
        self._saved_step: int | None = None
        self.last_write_s: float | None = None

    @property
    def has_written(self) -> bool:
        """Whether this rank has written, or failed to write, its part of a checkpoint that is not valid yet."""
        return self._pending is not None and self._pending.write.has_ended

    def resume(self, engine: Engine) -> TrainingState | None:
        """Load the state that the run continues, forks or warm-starts from; None where it starts from nothing.

        Of the run's own checkpoints the newest one that is complete is taken; see ``open_source``.

        Raises:
            UserError: a checkpoint is of another model or corpus, none is complete, or a fork has nothing to train.
            RunFailure: the storage is away, or the folder was lost.
        """
        source = self._open(None)
        if source is None:
            return None
        if not source.is_own and not source.weights_only:
            check_fork(self._config, source.reader.manifest.training.step)
            self._check_model_of_fork(source.reader)
        training = self._load(engine, source)
        if source.weights_only:
            return None
        if source.is_own:
            self._saved_step = training.step
            manifest, folder = source.reader.manifest, self._run_folder
            on_rank_0(lambda: record_changes(manifest, self._config, folder, self._inform), self._ranks)
            on_rank_0(lambda: say_other_precision(manifest, self._identity.precision_rule, self._inform), self._ranks)
        return training

    def roll_back(self, engine: Engine, last_step: int) -> TrainingState | None:
        """Load the run's newest complete checkpoint of ``last_step`` or before, and remove those after it.

        Returns:
            What training continues from; None, and nothing has changed, where there is no such checkpoint.

        Raises:
            UserError: the checkpoint that was being written could not be.
            RunFailure: the folder was lost.
        """
        self.finish()
        self._pruning.wait()
        source = self._open(last_step)
        if source is None:
            return None
        training = self._load(engine, source)
        # They are of a training that did not happen: were the run killed now, it must not continue from them.
        on_rank_0(lambda: self._remove_after(training.step), self._ranks)
        self._saved_step = training.step
        return training

    def _remove_after(self, step: int) -> None:
        # Also where there is none: what comes next moves lines of metrics.
        self._before_commit()
        remove_checkpoints_after(self._run_folder.checkpoints_dir, step, self._before_commit)

    def _open(self, last_step: int | None) -> Source | None:
        settings = self._config.checkpoint
        return open_source(settings, self._run_folder, self._ranks, self._before_commit, self._warn, last_step)

    def _load(self, engine: Engine, source: Source) -> TrainingState:
        reader, weights_only = source.reader, source.weights_only
        training = reader.manifest.training
        wanted, found = self._data_fingerprint(training.step), reader.manifest.data_fingerprint
        if not weights_only and found != wanted:
            if source.is_own or self._begin_corpus is None:
                raise UserError(
                    f"checkpoint {reader.folder} was trained on another corpus (fingerprint {found[:12]}, now "
                    f"{wanted[:12]}): its position in the data has no meaning here; restore the corpus, or start "
                    f"another run with checkpoint.from={self._run_folder.path}, which begins the corpus that it has."
                )
            training = self._begin_corpus(reader)
        names = self._fit_weights(reader) if weights_only else {}

        def read(part: Part) -> None:
            own = part.name.removeprefix(MODEL_PREFIX)
            stored = names.get(own, own)
            if stored is not None:
                reader.read_into(part if stored == own else replace(part, name=f"{MODEL_PREFIX}{stored}"))

        engine.load_state(read, with_optimizer=not weights_only)
        if self._weight_average is not None:
            # A run that turns averaging on begins with the weights it has.
            continues = reader.has_average and not weights_only
            self._weight_average.load(reader.read_into if continues else None)
        if self._weight_pruning is not None:
            self._weight_pruning.load(
                reader.tensors, reader.read_into, is_own=source.is_own, weights_only=weights_only, names=names
            )
        return training

    def start_saving(self, engine: Engine, training: TrainingState) -> None:
        """Copy all state, and write the copy in the background; every rank must call it.

        One before it that is still being written is waited for. Frozen parameters are written before training goes
        on, where they are not there yet: once in a run. Without ``checkpoint.asynchronous`` this is ``save``.

        Raises:
            UserError: a rank could not write.
        """
        if not self._config.checkpoint.asynchronous:
            self.save(engine, training)
            return
        # The buffer is still being read from, and two writes at once would only hold up each other.
        self.finish()
        if self._saved_step == training.step:
            return
        folder, rank = self._run_folder.checkpoint_path(training.step), self._ranks.rank
        parts = self._changing_state(engine, training.step)
        prepare_checkpoint(folder, parts, training.step, self._ranks, self._before_commit)
        copies = self._snapshot.take(parts)
        write = BackgroundWrite(
            lambda: write_rank_file(folder, copies, rank, lambda: self._before_write(training.step), self._attachments)
        )
        self._pending = _PendingSave(folder, training, self._identity_at(training.step), write)

    def save(self, engine: Engine, training: TrainingState) -> None:
        """Save all state and wait for it, unless this step is saved already; every rank must call it.

        Raises:
            UserError: a rank could not write.
        """
        self.finish()
        if self._saved_step == training.step:
            return
        folder = self._run_folder.checkpoint_path(training.step)
        parts = self._changing_state(engine, training.step)
        prepare_checkpoint(folder, parts, training.step, self._ranks, self._before_commit)
        report = write_rank_file(
            folder, parts, self._ranks.rank, lambda: self._before_write(training.step), self._attachments
        )
        self._commit(folder, report, training, self._identity_at(training.step))
        self._pruning.wait()

    def finish(self) -> None:
        """Wait for the save that is being written, if there is one, and make it valid; every rank must call it.

        Raises:
            UserError: a rank could not write.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            self._commit(pending.folder, pending.write.wait(), pending.training, pending.identity)

    def close(self) -> None:
        """Wait until nothing is written, which after a failure is no checkpoint, and what is not kept is deleted."""
        if self._pending is not None:
            self._pending.write.wait()
        self._pruning.wait()

    def _identity_at(self, step: int) -> CheckpointIdentity:
        """What a checkpoint of a step says about its run, now that the base is kept."""
        return replace(self._identity, data_fingerprint=self._data_fingerprint(step), base=self._base.name)

    def _changing_state(self, engine: Engine, step: int) -> list[Part]:
        """What a checkpoint holds itself, once the rest, which is frozen, lies beside it."""
        average, frozen = self._weight_average, frozen_names(engine)
        parts = engine.state(with_optimizer=True)
        base = [part for part in parts if part.name in frozen]
        self._base.keep(base, step, lambda: self._before_write(step), self._pruning.wait)
        changing = [part for part in parts if part.name not in frozen]
        beside = [] if self._weight_pruning is None else self._weight_pruning.state()
        return changing + beside + ([] if average is None else average.state())

    def _commit(
        self, folder: CheckpointPath, report: RankReport, training: TrainingState, identity: CheckpointIdentity
    ) -> None:
        """Make a checkpoint valid, and begin to delete what is not to be kept."""
        self.last_write_s = commit_checkpoint(folder, report, training, identity, self._ranks, self._before_commit)
        self._saved_step = training.step
        if self._ranks.rank == 0:
            self._pruning.start(
                self._run_folder.checkpoints_dir,
                self._config.checkpoint,
                self._config.evaluation.monitor,
                {name for name in (identity.base, self._base.name) if name is not None},
            )
            self._notify(training.step, folder)
