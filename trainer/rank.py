"""One rank from start to exit status: configuration, run folder, corpus, process group, Trainer, outcome."""

import atexit
import contextlib
import functools
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

import torch
import torch.distributed as dist

from sharding.ranks.errors import EXIT_FINISHED, EXIT_STOPPED, UserError
from sharding.ranks.object_exchange import broadcast_object, gather_objects
from sharding.ranks.process_group import Ranks, process_group
from sharding.ranks.process_lifetime import die_with_parent, is_started_by_launcher, stop_with_deepspeed
from sharding.ranks.rank_place import note_on_place, place_variables, read_ranks
from trainer.attempt import begin_attempt, check_continuation, freeze_config
from trainer.before_reading import check_before_reading
from trainer.build import build_trainer
from trainer.checkpoint.finish import complete_at
from trainer.checkpoint.trained_corpus import trained_fingerprints
from trainer.config import RunConfig, load_config
from trainer.config.frozen_config import all_differences
from trainer.config.rules import World, validate
from trainer.config.stages import describe_stage
from trainer.data.epochs import with_counted_epochs
from trainer.data.evaluation_sets import describe_trained
from trainer.data.prepare_stages import prepare_run
from trainer.data.prepared import is_of_present_source
from trainer.data.prepared_stages import find_stages, whole_run, with_tokenizer_of_first
from trainer.doctor.examination import check_before_training
from trainer.ending import Progress, TrainingResult, end_hanging, report_error, stop_watchdog
from trainer.faults.failure.agent_restarts import await_restart_of
from trainer.faults.hang.deadlines import Deadlines
from trainer.faults.hang.watchdog import Watchdog
from trainer.faults.injection.inject import faults_of, inject_faults, read_faults
from trainer.loop import ExitReason, Trainer
from trainer.metrics.file import last_metrics
from trainer.metrics.goodput_ledger import GoodputLedger
from trainer.metrics.stragglers import StragglerWatch
from trainer.report.end_of_run import write_run_goodput, write_run_report
from trainer.run_folder.attempt_record import AttemptRecord, write_attempt_record
from trainer.run_folder.folder import RunFolder
from trainer.run_folder.lease import Lease
from trainer.run_folder.provenance import changed_code
from trainer.runtime.drain import Drain
from trainer.runtime.foreign_settings import refuse_foreign_settings
from trainer.runtime.guest import as_guest
from trainer.runtime.host_memory import keep_freed_memory
from trainer.runtime.own_modules import refuse_within_import
from trainer.runtime.phases import Phase, Phases
from trainer.runtime.processes import ATTEMPT_VARIABLE, end_process, process_age_s
from trainer.runtime.randomness import use_deterministic_kernels
from trainer.runtime.rank_logs import redirect_output
from trainer.runtime.stopping import StopRequest
from trainer.runtime.threads import threads_per_rank
from trainer.trackers.composite import build_trackers
from trainer.trackers.console import Console
from trainer.trackers.observer import Observer, OwnObservers, check_observers
from trainer.trackers.observers import Observers


def main(arguments: Sequence[str]) -> NoReturn:
    """Run one rank and exit with its status: 0 finished, 75 stopped and saved, 2 bad input, 1 failed."""
    end_process(_run_to_the_end(lambda: _read_config(arguments), Progress()))


def train(config: RunConfig, observers: Sequence[Observer] = ()) -> TrainingResult:
    """Train as one of the ranks that a launcher has started, or alone; every rank must call it.

    All is as under ``python -m trainer``, but that the process goes on, and that an error is raised. Where one of
    several ranks has failed, its process ends without the interpreter's shutdown and with that failure's status, for
    the others may be inside a collective.

    Args:
        config: the run.
        observers: who is told of the run on rank 0.

    Raises:
        UserError: something that the user can mend is wrong.
        RunFailure: the run cannot go on.
    """
    refuse_within_import("train")
    check_observers(observers)
    _begin_under_launcher(config)
    progress = Progress(own_observers=observers, is_guest=True)
    # A group of the caller's own is refused, and how that process ends is not ours to say.
    was_in_group = dist.is_initialized()
    with as_guest():
        exit_code = _run_to_the_end(lambda: config, progress)
    if progress.error is not None:
        if dist.is_initialized() and not was_in_group:
            atexit.register(end_process, exit_code)
        elif progress.trainer is not None:
            # Nothing may be written beside what the process does next; it is the first error that counts.
            with contextlib.suppress(Exception):
                progress.trainer.close()
        raise progress.error
    return TrainingResult(
        status="finished" if progress.has_finished else "stopped",
        exit_code=exit_code,
        step=progress.step,
        metrics=progress.last_metrics,
        run_folder=config.run_dir,
    )


def _begin_under_launcher(config: RunConfig) -> None:
    """Do what ``python -m trainer`` does under a launcher before anything else.

    Raises:
        SystemExit: torchrun has started this rank again, where another attempt is in vain.
    """
    if is_started_by_launcher(os.environ):
        _end_with_launcher()
    num_restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    run_folder = RunFolder(config.run_dir)
    outcome = run_folder.read_outcome() or {}
    # Another run of the same process may be the one that failed.
    if not num_restarts or not run_folder.newest_attempt() or outcome.get("exit_code") == EXIT_FINISHED:
        return
    status = await_restart_of(config, num_restarts) if ATTEMPT_VARIABLE not in os.environ else None
    if status is not None:
        raise SystemExit(status)


@functools.cache
def _end_with_launcher() -> None:
    die_with_parent()
    stop_with_deepspeed()


def _run_to_the_end(read_config: Callable[[], RunConfig], progress: Progress) -> int:
    """Train, say how that ended wherever somebody may look, and clear away; returns the exit status."""
    try:
        # Before all else, so that whatever looks at the environment from here on finds torch's names.
        os.environ.update(place_variables(os.environ))
        progress.rank = read_ranks(os.environ)[0]
        exit_code = _run(read_config(), progress)
    except BaseException as error:  # noqa: BLE001 - whatever ends a rank must reach outcome.json
        exit_code = report_error(progress, error)
    if progress.ledger is not None:
        progress.ledger.finish()
        progress.ledger.write()
    if progress.rank == 0 and progress.run_folder is not None:
        write_run_report(progress.run_folder, progress.warn)
    if progress.observers is not None:
        progress.observers.close(exit_code)
    if progress.ledger is not None and progress.run_folder is not None:
        # Once more, since the report and the trackers took their time.
        progress.ledger.write()
        write_run_goodput(progress.run_folder)
    if progress.lease is not None:
        progress.lease.release()
    if progress.drain is not None:
        progress.drain.finish()
    return EXIT_FINISHED if exit_code == EXIT_STOPPED and _is_restarted_by_agent() else exit_code


def _is_restarted_by_agent() -> bool:
    """Whether torchrun was told to start ranks again that end with another status than 0: a stop must not count."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0


def _read_config(arguments: Sequence[str]) -> RunConfig:
    # The deepspeed launcher puts the local rank first; it is in the environment as well.
    arguments = [a for a in arguments if not a.startswith(("--local_rank", "--local-rank"))]
    if not arguments:
        raise UserError("no configuration given; write python -m trainer CONFIG [key=value ...].")
    return load_config(arguments[0], arguments[1:])


def _run(config: RunConfig, progress: Progress) -> int:
    rank, world_size, _, local_world_size = read_ranks(os.environ)
    world = World(world_size, has_gpu=torch.cuda.is_available(), num_local_ranks=local_world_size)
    validate(config, world)
    refuse_foreign_settings(os.environ)
    if note := note_on_place(os.environ):
        print(f"note: {note}", file=sys.stderr)
    if config.deterministic:
        use_deterministic_kernels()
    torch.set_num_threads(threads_per_rank(config, local_world_size, os.environ))
    stop_request = StopRequest()
    stop_request.install_handlers()

    run_folder = RunFolder.of(config)
    attempt = _begin_attempt(config, world, run_folder, progress)
    if attempt:
        # Not before: until the folder is ours, outcome.json is for its holder to write.
        progress.run_folder, progress.attempt = run_folder, attempt
    if rank == 0:
        # What a guest's process did before is none of the run's time.
        age_s = 0.0 if progress.is_guest else process_age_s()
        progress.ledger = GoodputLedger(run_folder.path, attempt, progress.phases, process_age_s=age_s)
    fingerprints = trained_fingerprints(config, run_folder)
    # A launcher of ours has checked it.
    if ATTEMPT_VARIABLE not in os.environ and find_stages(config, fingerprints) is None:
        check_before_reading(config, world, run_folder, rank)
    # Every rank asks; a file lock lets one of them work while the others wait. No collective has begun, so however
    # long it takes, nothing times out.
    corpora = prepare_run(config, fingerprints, progress=rank == 0)
    counted = with_counted_epochs(config, corpora[0].corpus)
    if rank == 0 and counted != config:
        # A launcher of ours has counted them before.
        check_continuation(run_folder, counted)
        freeze_config(run_folder, counted, attempt)
    config = counted
    if config.epochs is not None:
        corpora = whole_run(config, corpora[0].corpus, corpora[0].sets)
    # Not before: what preparing took is not needed again.
    if not world.has_gpu:
        keep_freed_memory(os.environ)
    progress.phases.enter(Phase.JOIN)
    with process_group(config.launch.init_timeout_s) as ranks:
        prepared = [of_stage for one in corpora for of_stage in (one.corpus, *one.sets.values())]
        _refuse_other_config(config, [of_stage.fingerprint for of_stage in prepared], ranks)
        attempt = _agree_on_attempt(attempt, run_folder, ranks)
        progress.run_folder, progress.attempt = run_folder, attempt
        redirect_output(run_folder.log_dir(attempt), ranks.rank)
        faults = read_faults(os.environ)
        inject_faults(faults, progress.phases, run_folder.path, ranks.rank, attempt)
        # Apart from the phases of training, which go on while a checkpoint is written.
        writing = Phases()
        inject_faults(faults, writing, run_folder.path, ranks.rank, attempt)
        progress.phases.enter(Phase.BUILD)
        _start_watchdog(config, ranks, progress)
        progress.observers = observers = _build_observers(config, run_folder, ranks, progress)
        for one in corpora if rank == 0 else []:
            data = with_tokenizer_of_first(one.stage.config.data, corpora[0].corpus if one.stage.index else None)
            if not is_of_present_source(one.corpus, data):
                observers.info(
                    f"the run goes on with its prepared corpus {one.corpus.folder}, though its sources have moved or "
                    "changed since, or this release would prepare them otherwise"
                )
            for sentence in describe_trained(one.sets, one.corpus):
                observers.warn(sentence)
        if config.launch.preflight:
            for check in check_before_training(ranks, run_folder.path):
                observers.warn(f"{check.name}: {check.value}; {check.remedy}")
        progress.trainer = trainer = build_trainer(
            config,
            ranks,
            corpora,
            run_folder,
            observers,
            progress.phases,
            faults=faults_of(faults, ranks.rank, attempt),
            is_stop_requested=lambda: stop_request.poll(run_folder.stop_file if ranks.rank == 0 else None),
            before_commit=lambda: progress.lease.check() if progress.lease is not None else None,
            before_write=lambda step: writing.enter(Phase.WRITE, step),
        )
        trainer.resume_or_init()
        if ranks.rank == 0:
            record = AttemptRecord(began_after=trainer.step, model=trainer.parts.description)
            # A report that lacks it is no reason to end a run.
            with contextlib.suppress(OSError):
                write_attempt_record(run_folder.log_dir(attempt), record)
        exit_reason = _train(trainer, config, run_folder, observers, ranks, progress.phases, stop_request)
        newest = last_metrics(run_folder.metrics_file) if ranks.rank == 0 else {}
        progress.last_metrics = broadcast_object(newest, ranks)
        # What comes now is rank 0's alone, and may take its time: trackers that send what they have.
        stop_watchdog(progress)
        progress.drain = Drain(ranks)
    progress.has_finished = exit_reason is ExitReason.FINISHED
    return EXIT_FINISHED if progress.has_finished else EXIT_STOPPED


def _train(
    trainer: Trainer,
    config: RunConfig,
    run_folder: RunFolder,
    observers: Observers,
    ranks: Ranks,
    phases: Phases,
    stop_request: StopRequest,
) -> ExitReason:
    observers.start(trainer.step)
    if trainer.finish_reason is not None:
        observers.info(f"run {config.name} is {complete_at(trainer.step, trainer.finish_reason)}; nothing to do")
    elif trainer.step:
        observers.info(f"continuing after step {trainer.step}")
        for sentence in changed_code(run_folder.path, observers.attempt) if ranks.rank == 0 else ():
            observers.warn(sentence)
    stage = trainer.parts.stage_of(trainer.step).stage
    if stage.name and trainer.step < stage.end_step:
        observers.info(describe_stage(stage, len(trainer.parts.stages)))
    exit_reason = trainer.fit()
    phases.enter(Phase.FINISH)
    trainer.close()
    if ranks.rank == 0:
        exit_code = EXIT_FINISHED if exit_reason is ExitReason.FINISHED else EXIT_STOPPED
        cause = stop_request.describe(run_folder.stop_file)
        stopped = f"stopped {f'by {cause}' if cause else 'on request'}; run again to continue"
        reason = trainer.finish_reason or stopped
        run_folder.write_outcome(exit_reason.value, exit_code, trainer.step, reason)
        if observers.ledger is not None:
            observers.info(observers.ledger.sentence())
    if ranks.world_size > 1:
        # torchrun takes the first rank that exits with 75 for a failure and ends the others: not before the outcome is
        # there.
        dist.barrier()
    return exit_reason


def _begin_attempt(config: RunConfig, world: World, run_folder: RunFolder, progress: Progress) -> int:
    """The attempt's number; 0 on ranks that must hear it from rank 0."""
    if "SHARDLINE_ATTEMPT" in os.environ:
        attempt = int(os.environ["SHARDLINE_ATTEMPT"])
        if progress.rank == 0:
            progress.lease = Lease.attach(run_folder.path, os.environ["SHARDLINE_LEASE"])
            run_folder.check_attempt_config(config, attempt)
        return attempt
    if progress.rank != 0:
        return 0
    progress.lease = Lease.acquire(run_folder.path)
    run_folder.lease_token = progress.lease.token
    return begin_attempt(run_folder, config, world, sys.argv)


def _refuse_other_config(config: RunConfig, fingerprints: list[str], ranks: Ranks) -> None:
    """Assert that every rank has read what rank 0 has: the settings of the attempt, and the data."""
    first, first_fingerprints = broadcast_object((config, fingerprints), ranks)
    differences = gather_objects(all_differences(first, config), ranks)
    has_other_data = gather_objects(fingerprints != first_fingerprints, ranks)
    if found := next(((rank, differing) for rank, differing in enumerate(differences) if differing), None):
        rank, differing = found
        raise UserError(
            f"rank 0 and rank {rank} have read different settings ({'; '.join(differing)}): the configuration was "
            "changed while ranks were starting, or nodes see different files of its name; run again."
        )
    if True in has_other_data:
        raise UserError(
            f"rank 0 and rank {has_other_data.index(True)} have prepared different corpora from data.source="
            f"{config.data.source} or evaluation.sets: their nodes see other files, or have another Python or "
            "tokenizer; prepare them once with shardline data prepare, and set data.cache_dir to a folder that all "
            "nodes share."
        )


def _agree_on_attempt(attempt: int, run_folder: RunFolder, ranks: Ranks) -> int:
    """The attempt's number, from rank 0; also its lease's token, which tells each rank whether the folder is lost."""
    attempt, run_folder.lease_token = broadcast_object((attempt, run_folder.lease_token), ranks)
    return attempt


def _build_observers(config: RunConfig, run_folder: RunFolder, ranks: Ranks, progress: Progress) -> Observers:
    if ranks.rank != 0:
        return Observers(run_folder.metrics_file, attempt=progress.attempt)
    console = Console(total_steps=config.num_steps, unit=config.data.unit)
    trackers = build_trackers(config, run_folder.path, run_folder.metrics_file, console.warning)
    stragglers = StragglerWatch(config.faults.straggler_ratio)
    own = OwnObservers(progress.own_observers, console.warning)
    return Observers(run_folder.metrics_file, console, trackers, progress.attempt, stragglers, progress.ledger, own)


def _start_watchdog(config: RunConfig, ranks: Ranks, progress: Progress) -> None:
    faults = config.faults
    if not faults.watchdog or progress.run_folder is None:
        return
    progress.watchdog = Watchdog(
        progress.phases,
        Deadlines(factor=faults.watchdog_factor, min_s=faults.watchdog_min_s, startup_s=config.launch.init_timeout_s),
        progress.run_folder.log_dir(progress.attempt),
        rank=ranks.rank,
        world_size=ranks.world_size,
        min_s=faults.watchdog_min_s,
        on_hang=lambda hang: end_hanging(progress, hang),
    )
    progress.watchdog.start()
