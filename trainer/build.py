"""From a RunConfig to a Trainer: the one place that puts a rank's parts together, in order."""

import os
from collections.abc import Callable, Sequence

from sharding.engine import Engine
from sharding.mesh import build_mesh
from sharding.precision import compute_dtype
from sharding.ranks.process_group import Ranks, set_step_timeout
from sharding.state import MODEL_PREFIX, is_projection
from trainer.checkpoint.checkpointer import Checkpointer
from trainer.checkpoint.reader import CheckpointReader
from trainer.checkpoint.source import on_rank_0
from trainer.checkpoint.stage_state import on_another_corpus
from trainer.checkpoint.token_ids import check_named_tokenizer, check_tokenizer_of_checkpoint
from trainer.checkpoint.tokenizer_archive import TokenizerArchive, pack_tokenizer
from trainer.checkpoint.training_state import TrainingState
from trainer.config import RunConfig
from trainer.config.stages import Stage, stage_of_step
from trainer.data.any_samples import prepared_samples
from trainer.data.prepared import Prepared, PreparedTokens, describe_entropy, describe_mixture
from trainer.data.prepared_rows import PreparedRows
from trainer.data.prepared_stages import StageCorpus
from trainer.distillation.begin import begin_distillation
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
from trainer.optimizers.prune_choice import pruned_parameters
from trainer.optimizers.pruning import Pruning
from trainer.optimizers.weight_average import WeightAverage
from trainer.parts import TrainerParts
from trainer.run_folder.events import record_event
from trainer.run_folder.folder import RunFolder
from trainer.runtime.phases import Phase, Phases
from trainer.stages import StageParts, build_stage
from trainer.tasks.causal_lm import check_targets, predicts_next_tokens
from trainer.tasks.evaluation import Evaluation
from trainer.tasks.monitor import check_monitor
from trainer.tasks.named_sums import NamedSums
from trainer.tasks.registry import configured_task
from trainer.trackers.observers import Observers


def build_trainer(
    config: RunConfig,
    ranks: Ranks,
    corpora: Sequence[StageCorpus],
    run_folder: RunFolder,
    observers: Observers,
    phases: Phases,
    *,
    faults: Sequence[Fault] = (),
    is_stop_requested: Callable[[], bool],
    before_commit: Callable[[], None],
    before_write: Callable[[int], None] = lambda _: None,
) -> Trainer:
    """Put one rank's trainer together; the process group must be up.

    Args:
        config: a configuration that is valid for this world.
        ranks: this rank's place.
        corpora: what is prepared of each stage, see ``trainer.data.prepare_stages``.
        run_folder: where the run lives.
        observers: who watches.
        phases: what this rank is doing.
        faults: what is triggered on this rank on purpose.
        is_stop_requested: whether this rank was asked to stop.
        before_commit: see Checkpointer.
        before_write: see Checkpointer.

    Raises:
        UserError: model, task, tokenizer and data do not fit together.
    """
    verify = config.faults.verify_data
    all_samples = [prepared_samples(one.corpus, one.stage.config.data, verify=verify) for one in corpora]
    # The model has positions for the longest sequences.
    longest = max(range(len(corpora)), key=lambda index: corpora[index].stage.config.data.sequence_length)
    corpus, samples, widest = corpora[longest].corpus, all_samples[longest], corpora[longest].stage.config
    task = configured_task(config.task, samples.facts, config.seed, compiles_loss=config.compiles_loss)
    check_monitor(widest, task)
    if faults:
        task = CorruptedTask(
            task,
            faults,
            widest.batch.global_size,
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
    fetched = _fetched(widest, ranks)
    masked = [_with_stage(fetched, one.stage) for one in corpora if one.stage.config.data.document_mask]
    for stage_config in masked:
        check_architecture(stage_config, task, samples.facts)
    if config.model.pretrained is not None and config.checkpoint.from_ is None:
        on_rank_0(lambda: _check_beginning(config, run_folder, corpus), ranks)
    busy = BusyMeter(phases, config.parallel.strategy)
    named_sums = NamedSums(task)
    distilled = begin_distillation(
        widest,
        task,
        corpus,
        samples,
        mesh,
        ranks,
        run_folder,
        observers.info,
        # For the watchdog, which else takes what lasts for a hang.
        alive=lambda: phases.enter(Phase.BUILD),
    )
    training_loss, read_answers = (None, None) if distilled is None else distilled
    engine, facts = build_model_engine(
        fetched,
        task,
        mesh,
        ranks,
        samples.facts,
        busy.timed,
        named_sums,
        training_loss=training_loss,
        add_modules=(lambda _: ()) if training_loss is None else training_loss.add_projections,
    )
    description = describe_model(widest, facts, ranks)
    observers.info(description)
    for line in facts.notes:
        observers.info(line)
    if predicts_next_tokens(task):
        check_causality(engine, widest, samples.facts, ranks)
    if config.metrics.parameter_hash:
        observers.info(f"initial parameters {parameter_hash(engine, ranks)}")
    stages = [
        build_stage(
            one,
            of_stage,
            mesh.data,
            ranks,
            observers,
            scales_loss=engine.loss_scale is not None,
            beside=read_answers,
        )
        for one, of_stage in zip(corpora, all_samples, strict=True)
    ]
    for one, of_stage in zip(corpora, all_samples, strict=True):
        if one.stage.config.data.has_messages and not predicts_next_tokens(task):
            check_targets(config.task.name, task, of_stage)
    for stage_config in masked:
        check_engine(engine, stage_config, task, samples.facts)
    for one in corpora:
        data, num_positions = one.stage.config.data, one.stage.config.num_steps * one.stage.config.batch.global_size
        for line in describe_mixture(one.corpus, data.sequence_length, num_positions):
            observers.info(f"{one.stage.label}: {line}" if one.stage.name else line)
    if config.task.name == "masked-lm" and isinstance(corpus, PreparedTokens):
        for line in describe_entropy(corpus):
            observers.info(line)

    average = WeightAverage(engine, config.optimizer.ema_decay) if config.optimizer.ema_decay else None
    pruning = _build_pruning(config, engine, facts, ranks, average, observers)
    parts = TrainerParts(
        engine=engine,
        task=task,
        ranks=ranks,
        mesh=mesh,
        stages=stages,
        evaluation=Evaluation(engine, task, named_sums, ranks, mesh.data, config.seed),
        checkpointer=Checkpointer(
            config,
            run_folder,
            lambda step: stages[stage_of_step([one.stage for one in corpora], step).index].fingerprint,
            ranks,
            before_commit,
            average,
            # Rank 0 writes it.
            _tokenizer_of(_with_chat_template(corpora, corpus)) if ranks.rank == 0 else None,
            corpus.recipe if isinstance(corpus, PreparedRows) else None,
            begin_corpus=lambda reader: _begin_corpus(config, reader, stages, corpus, ranks, observers),
            check_model_of_fork=lambda reader: _check_adapters(config, reader, engine),
            fit_weights=lambda reader: _fit_weights(config, reader, corpus, engine, facts, ranks, observers),
            inform=observers.info,
            warn=observers.warn,
            notify=observers.saved,
            before_write=before_write,
            pruning=pruning,
        ),
        observers=observers,
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
        pruning=pruning,
        weight_average=average,
    )
    trainer = Trainer(config, parts)
    if isinstance(task, CorruptedTask):
        task.next_samples = lambda: trainer.next_samples
    return trainer


def _build_pruning(
    config: RunConfig,
    engine: Engine,
    facts: ModelFacts,
    ranks: Ranks,
    average: WeightAverage | None,
    observers: Observers,
) -> Pruning:
    """What keeps pruned weights at zero, the run's own and those of what it begins with."""
    names: list[str] = []
    if config.prune.sparsity:
        parts = {part.name: part.global_shape for part in engine.state(with_optimizer=False)}
        trained = [name for name, parameter in engine.named_parameters() if parameter.requires_grad]
        shapes = {name: parts[f"{MODEL_PREFIX}{name}"] for name in trained}
        names = pruned_parameters(config.prune, facts.layer_weights, shapes)
    refusal = ""
    if config.parallel.backend == "deepspeed":
        refusal = "parallel.backend=deepspeed cannot keep at zero, for it does not show their gradients"
    elif config.metrics.gradient_noise_scale:
        refusal = "metrics.gradient_noise_scale=true would measure with the gradients that they do not have"
    return Pruning(
        engine,
        config.prune,
        config.optimizer.name,
        names,
        ranks,
        average=average,
        refusal=refusal,
        inform=observers.info,
    )


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
    _check_adapters(config, reader, engine)
    parts = engine.state(with_optimizer=False)
    wanted = {part.name.removeprefix(MODEL_PREFIX): part.global_shape for part in parts}
    shapes, source = reader.parameter_shapes(), f"checkpoint {reader.folder}"
    found = stored_names(wanted, shapes)
    stored = {name: shapes[there] for name, there in found.items()}
    # Adapters and projections of the run's own begin as they are.
    own = {name for name in wanted if is_adapter(name) or is_projection(name)}
    needed = {name: shape for name, shape in wanted.items() if name in stored or name not in own}
    new = weights_to_initialize(needed, stored, facts.body, source, has_new_head=config.model.new_head)
    if new:
        observers.info(describe_new_head(new, wanted, stored, source))
    return found | dict.fromkeys([*new, *(name for name in wanted if name not in needed)])


def _check_adapters(config: RunConfig, reader: CheckpointReader, engine: Engine) -> None:
    """Check that adapters of another run have the effect here that they had there."""
    wanted = [part.name.removeprefix(MODEL_PREFIX) for part in engine.state(with_optimizer=False)]
    of_stored, source = reader.manifest.config["model"], f"checkpoint {reader.folder}"
    check_stored_adapters(wanted, reader.parameter_names(), config.model.lora, of_stored, source)


def _begin_corpus(
    config: RunConfig,
    reader: CheckpointReader,
    stages: Sequence[StageParts],
    corpus: Prepared,
    ranks: Ranks,
    observers: Observers,
) -> TrainingState:
    """The state of another run's checkpoint at the beginning of this run's corpus, which must have its token ids."""
    on_rank_0(lambda: _check_tokenizer(reader, corpus), ranks)
    training = reader.manifest.training
    stage = stage_of_step([parts.stage for parts in stages], training.step)
    named = f" of {stage.label}" if stage.name else ""
    observers.info(
        f"{config.checkpoint.from_} was trained on another corpus: step {training.step + 1} reads the beginning of "
        f"this run's{named}; counters, optimizer and schedule go on"
    )
    return on_another_corpus(training, stage, {parts.stage.name: parts.fingerprint for parts in stages})


def _with_chat_template(corpora: Sequence[StageCorpus], corpus: Prepared) -> Prepared:
    """Of corpora with one tokenizer the latest that has conversations, whose template an export is to have."""
    return next((one.corpus for one in reversed(corpora) if one.stage.config.data.has_messages), corpus)


def _with_stage(config: RunConfig, stage: Stage) -> RunConfig:
    """The configuration of a stage whose pretrained model, if it has one, was fetched."""
    return stage.config.model_copy(update={"model": config.model})


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
