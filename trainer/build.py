"""From a RunConfig to a Trainer: the one place that puts a rank's parts together, in order."""

import os
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from sharding.engine import Engine
from sharding.mesh import ParallelMesh, build_mesh
from sharding.precision import compute_dtype
from sharding.ranks.errors import UserError
from sharding.ranks.process_group import Ranks, set_step_timeout
from sharding.state import MODEL_PREFIX
from trainer.checkpoint.checkpointer import Checkpointer
from trainer.checkpoint.reader import CheckpointReader
from trainer.checkpoint.source import on_rank_0
from trainer.checkpoint.token_ids import check_named_tokenizer, check_tokenizer_of_checkpoint
from trainer.checkpoint.tokenizer_archive import TokenizerArchive, pack_tokenizer
from trainer.checkpoint.training_state import TrainingState
from trainer.config import RunConfig
from trainer.data.any_samples import prepared_samples
from trainer.data.documents import documents_in
from trainer.data.evaluation_sets import set_batches
from trainer.data.loader import BatchLoader, evaluation_batches
from trainer.data.prepared import Prepared, PreparedStream, PreparedTokens, describe_entropy, describe_mixture
from trainer.data.prepared_rows import PreparedRows
from trainer.data.row_samples import RowSamples
from trainer.data.samples import Samples
from trainer.data.skipped_samples import SkippedSamples
from trainer.data.streaming import StreamingLoader, state_of_rank
from trainer.faults.injection.corrupted_samples import CorruptedTask
from trainer.faults.injection.inject import Fault
from trainer.loop import Trainer
from trainer.metrics.peak_flops import compute_format, peak_flops
from trainer.metrics.profiling import StepProfiler
from trainer.metrics.stragglers import BusyMeter
from trainer.metrics.system_metrics import SystemMeter
from trainer.model.causality import check_causality
from trainer.model.document_mask import check_architecture, check_engine
from trainer.model.engine import build_model_engine, describe_model, parameter_hash
from trainer.model.fetch import fetch_pretrained
from trainer.model.lora import check_stored_adapters, is_adapter, stored_names
from trainer.model.models import ModelFacts
from trainer.model.new_head import describe_new_head, weights_to_initialize
from trainer.numerics.replica_check import ReplicaCheck
from trainer.numerics.spike_policy import SpikePolicy
from trainer.optimizers.weight_average import WeightAverage
from trainer.parts import TrainerParts
from trainer.run_folder.events import record_event
from trainer.run_folder.folder import RunFolder
from trainer.runtime.phases import Phase, Phases
from trainer.tasks.causal_lm import check_targets, predicts_next_tokens
from trainer.tasks.evaluation import Evaluation
from trainer.tasks.monitor import check_monitor
from trainer.tasks.named_sums import NamedSums
from trainer.tasks.registry import configured_task
from trainer.trackers.observers import Observers


def build_trainer(
    config: RunConfig,
    ranks: Ranks,
    corpus: Prepared,
    run_folder: RunFolder,
    observers: Observers,
    phases: Phases,
    *,
    sets: Mapping[str, Prepared] = MappingProxyType({}),
    faults: Sequence[Fault] = (),
    is_stop_requested: Callable[[], bool],
    before_commit: Callable[[], None],
    before_write: Callable[[int], None] = lambda _: None,
) -> Trainer:
    """Put one rank's trainer together; the process group must be up.

    Args:
        config: a configuration that is valid for this world.
        ranks: this rank's place.
        corpus: what is prepared.
        run_folder: where the run lives.
        observers: who watches.
        phases: what this rank is doing.
        sets: what is prepared of ``evaluation.sets``, by name.
        faults: what is triggered on this rank on purpose.
        is_stop_requested: whether this rank was asked to stop.
        before_commit: see Checkpointer.
        before_write: see Checkpointer.

    Raises:
        UserError: model, task, tokenizer and data do not fit together.
    """
    samples = prepared_samples(corpus, config.data, verify=config.faults.verify_data)
    task = configured_task(config.task, samples.facts, config.seed)
    check_monitor(config, task)
    if faults:
        task = CorruptedTask(
            task,
            faults,
            config.batch.global_size,
            lambda fault: record_event(
                run_folder.path,
                "injected",
                attempt=observers.attempt,
                step=phases.now.step,
                fault=fault,
                rank=ranks.rank,
            ),
        )
    mesh = build_mesh(config.parallel, ranks)
    fetched = _fetched(config, ranks)
    if config.data.document_mask:
        check_architecture(fetched, task, samples.facts)
    if config.model.pretrained is not None and config.checkpoint.from_ is None:
        on_rank_0(lambda: _check_beginning(config, run_folder, corpus), ranks)
    busy = BusyMeter(phases, config.parallel.strategy)
    named_sums = NamedSums(task)
    engine, facts = build_model_engine(fetched, task, mesh, ranks, samples.facts, busy.timed, named_sums)
    description = describe_model(config, facts, ranks)
    observers.info(description)
    for line in facts.notes:
        observers.info(line)
    if predicts_next_tokens(task):
        check_causality(engine, config, samples.facts, ranks)
    if config.metrics.parameter_hash:
        observers.info(f"initial parameters {parameter_hash(engine, ranks)}")
    corpus.check_sequence_length(config.data.sequence_length)
    check_held_out(config, samples)
    if config.data.has_messages and not predicts_next_tokens(task):
        check_targets(config.task.name, task, samples)
    if config.data.document_mask:
        check_engine(engine, fetched, task, samples.facts)
    for line in describe_mixture(corpus, config.data.sequence_length, config.num_steps * config.batch.global_size):
        observers.info(line)

    if config.task.name == "masked-lm" and isinstance(corpus, PreparedTokens):
        for line in describe_entropy(corpus):
            observers.info(line)

    average = WeightAverage(engine, config.optimizer.ema_decay) if config.optimizer.ema_decay else None
    parts = TrainerParts(
        engine=engine,
        task=task,
        ranks=ranks,
        mesh=mesh,
        build_loader=lambda training: _build_loader(config, corpus, mesh, training),
        evaluation=Evaluation(engine, task, named_sums, ranks, mesh.data, config.seed),
        evaluation_batches=lambda: evaluation_batches(
            samples,
            "validation",
            micro_size=config.batch.micro_size,
            dp_rank=mesh.data.rank,
            dp_degree=mesh.data.degree,
            max_samples=config.evaluation.max_sequences,
            spread=bool(config.data.mixture) or config.data.has_rows,
        ),
        evaluation_sets=set_batches(config, corpus, sets, mesh.data),
        checkpointer=Checkpointer(
            config,
            run_folder,
            samples.fingerprint,
            ranks,
            before_commit,
            average,
            # Rank 0 writes it.
            _tokenizer_of(corpus) if ranks.rank == 0 else None,
            corpus.recipe if isinstance(corpus, PreparedRows) else None,
            fit_weights=lambda reader: _fit_weights(config, reader, corpus, engine, facts, ranks, observers),
            warn=observers.warn,
            notify=observers.saved,
            before_write=before_write,
        ),
        observers=observers,
        spike_policy=SpikePolicy(
            config,
            ranks,
            observers,
            lambda ranges: [] if config.data.streaming else documents_in(config, corpus, ranges),
            scales_loss=engine.loss_scale is not None,
        ),
        phases=phases,
        is_stop_requested=is_stop_requested,
        compare_replicas=_replica_check(config, engine, ranks, observers, phases),
        after_first_step=lambda: set_step_timeout(config.launch.step_timeout_s),
        profiler=StepProfiler(
            run_folder.path / "profile", config.metrics.profile_steps, ranks.rank, ranks.device, engine.settle
        ),
        meter=SystemMeter(ranks, os.environ, enabled=config.metrics.system),
        facts=facts,
        description=description,
        busy=busy,
        peak_flops=_peak_flops(config, ranks),
        weight_average=average,
    )
    trainer = Trainer(config, parts)
    if isinstance(task, CorruptedTask):
        task.next_samples = lambda: trainer.next_samples
    return trainer


def _fit_weights(
    config: RunConfig,
    reader: CheckpointReader,
    corpus: Prepared,
    engine: Engine,
    facts: ModelFacts,
    ranks: Ranks,
    observers: Observers,
) -> dict[str, str | None]:
    """Check that another run's weights fit, and say where tensors lie there; None for those that keep their values."""
    on_rank_0(lambda: _check_tokenizer(reader, corpus), ranks)
    parts = engine.state(with_optimizer=False)
    wanted = {part.name.removeprefix(MODEL_PREFIX): part.global_shape for part in parts}
    shapes, source = reader.parameter_shapes(), f"checkpoint {reader.folder}"
    check_stored_adapters(wanted, shapes, config.model.lora, reader.manifest.config["model"], source)
    found = stored_names(wanted, shapes)
    stored = {name: shapes[there] for name, there in found.items()}
    # Adapters of the run's own begin as they are.
    needed = {name: shape for name, shape in wanted.items() if name in stored or not is_adapter(name)}
    new = weights_to_initialize(needed, stored, facts.body, source, has_new_head=config.model.new_head)
    if new:
        observers.info(describe_new_head(new, wanted, stored, source))
    return found | dict.fromkeys([*new, *(name for name in wanted if name not in needed)])


def _fetched(config: RunConfig, ranks: Ranks) -> RunConfig:
    """The configuration with the folder of the pretrained model in place of its name; every rank must call it."""
    if config.model.pretrained is None:
        return config
    folder = fetch_pretrained(config.model.pretrained, ranks)
    return config.model_copy(update={"model": config.model.model_copy(update={"pretrained": folder})})


def _check_beginning(config: RunConfig, run_folder: RunFolder, corpus: Prepared) -> None:
    """Check that a run that begins with pretrained weights has their tokenizer; one that goes on has its own."""
    if run_folder.newest_checkpoint() is None:
        check_named_tokenizer(config, corpus.tokenizer_dir)


def _tokenizer_of(corpus: Prepared) -> TokenizerArchive | None:
    if corpus.tokenizer_dir is None or corpus.vocab_size is None:
        return None
    return pack_tokenizer(corpus.tokenizer_dir, corpus.vocab_size, corpus.eos_token_id)


def _check_tokenizer(reader: CheckpointReader, corpus: Prepared) -> None:
    if corpus.tokenizer_dir is not None:
        check_tokenizer_of_checkpoint(reader, corpus.tokenizer_dir)


def check_held_out(config: RunConfig, samples: Samples) -> None:
    """Assert that there is something to evaluate where that was asked for.

    Raises:
        UserError: there is not.
    """
    every_steps = config.evaluation.every_steps
    if every_steps and samples.num_samples("validation") == 0:
        if config.data.factory is not None:
            which, remedy = f"data.factory={config.data.factory}", "let it"
        else:
            which = f"data.validation_fraction={config.data.validation_fraction:g}"
            # Of few, all may be on one side.
            remedy = "raise it, or give more documents, of which each is held out whole or not at all"
            remedy = "raise it" if config.data.has_rows else remedy
        raise UserError(
            f"evaluation.every_steps={every_steps} evaluates held-out samples, but {which} holds out none of these; "
            f"{remedy}, or set evaluation.every_steps=0."
        )


def _peak_flops(config: RunConfig, ranks: Ranks) -> float | None:
    """What the device could do, FLOP/s; None where it is not known, or the arithmetic of a sample is not."""
    if config.data.unit != "tokens":
        return None
    return peak_flops(
        ranks.device, compute_format(config.precision.compute, compute_dtype(config.precision, ranks.device))
    )


def _replica_check(
    config: RunConfig, engine: Engine, ranks: Ranks, observers: Observers, phases: Phases
) -> Callable[[int], None]:
    if config.faults.replica_check_every_steps == 0:
        return lambda _step: None
    check = ReplicaCheck(engine, ranks, lambda step, details: observers.event("replica_mismatch", step, **details))

    def compare(step: int) -> None:
        phases.enter(Phase.COMPARE)
        check.run(step)

    return compare


def _build_loader(
    config: RunConfig, corpus: Prepared, mesh: ParallelMesh, training: TrainingState
) -> BatchLoader | StreamingLoader:
    """A loader that starts where the training is.

    Raises:
        UserError: the place in a stream is of another number of ranks.
    """
    data, batch = config.data, config.batch
    if isinstance(corpus, PreparedStream):
        return StreamingLoader(
            corpus,
            data,
            seed=config.seed,
            global_size=batch.global_size,
            micro_size=batch.micro_size,
            dp_rank=mesh.data.rank,
            dp_degree=mesh.data.degree,
            start_sample=training.num_samples,
            state=state_of_rank(training.loader_states, training.num_samples, mesh.data.rank, mesh.data.degree),
        )
    samples = prepared_samples(corpus, data, verify=config.faults.verify_data)
    return BatchLoader(
        samples,
        corpus.order(config.seed, data),
        global_size=batch.global_size,
        micro_size=batch.micro_size,
        dp_rank=mesh.data.rank,
        dp_degree=mesh.data.degree,
        start_sample=training.num_samples,
        skipped=SkippedSamples(training.skipped_samples),
        lengths=samples.lengths if data.bucket_by_length and isinstance(samples, RowSamples) else None,
    )
