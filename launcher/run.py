"""``shardline run``: from a configuration file to the exit status of a run."""

import os
import sys
import tempfile
from collections.abc import Mapping, Sequence

from launcher.child import start_child
from launcher.command import rendezvous_port
from launcher.conclusion import EXIT_INTERRUPTED
from launcher.import_path import module_command
from launcher.lasting_output import lasting_output
from launcher.local import run_ranks
from launcher.next_steps import next_steps
from launcher.plan import Plan, make_plan
from launcher.preview import preview
from launcher.restarts import Restarts
from launcher.stop_signals import StopSignals
from sharding.ranks.errors import EXIT_FINISHED, EXIT_STOPPED, RunFailure, UserError
from sharding.ranks.sentences import print_error, print_warning
from trainer.attempt import begin_attempt, check_continuation, finished
from trainer.checkpoint.finish import complete_at, remedy
from trainer.checkpoint.reference import check_source
from trainer.checkpoint.trained_corpus import trained_fingerprints
from trainer.config import RunConfig, config_to_yaml
from trainer.config.rules import World
from trainer.config.stages import errors_of_stage, stages_of
from trainer.data.prepared import Prepared
from trainer.data.prepared_stages import find_stages
from trainer.distillation.named_teacher import check_corpus, check_teacher
from trainer.report.end_of_run import write_run_report
from trainer.run_folder.folder import RunFolder
from trainer.run_folder.lease import Lease
from trainer.runtime.json_output import print_json


@lasting_output()
def run(
    config_path: str,
    overrides: Sequence[str],
    nproc_per_node: int | None,
    launcher: str,
    dry_run: bool,
    as_json: bool = False,
) -> int:
    """Check everything that can be known before ranks start, then start them and see them through.

    Args:
        config_path: the file.
        overrides: ``key=value`` arguments.
        nproc_per_node: ranks on this machine; None means one per GPU, or two.
        launcher: what starts them: torchrun, deepspeed or accelerate.
        dry_run: only show what would be started.
        as_json: show that as one JSON document.

    Returns:
        The exit status of the run.

    Raises:
        UserError: something that the user can mend is wrong.
    """
    plan = make_plan(config_path, overrides, nproc_per_node, launcher)
    run_folder = RunFolder.of(plan.config)
    # What a function of the user's own made another time says nothing of how many samples it makes now.
    if plan.config.epochs is not None and plan.config.data.source != "factory":
        found = find_stages(plan.config, trained_fingerprints(plan.config, run_folder))
        plan = plan if found is None else plan.with_counted_epochs(found[0])
    if dry_run:
        found_out = preview(plan.config, plan.world)
        if as_json:
            print_json(plan.values(found_out))
        else:
            print(plan.describe(found_out))
        return EXIT_FINISHED
    config = plan.config
    check_continuation(run_folder, config)
    check_source(config, run_folder)
    if _is_finished(run_folder, config):
        return EXIT_FINISHED
    check_teacher(config)
    port = rendezvous_port(config.launch.master_port)
    lease = Lease.acquire(run_folder.path)
    run_folder.lease_token = lease.token
    try:
        corpora = _prepared_corpora(config, trained_fingerprints(config, run_folder), plan.world)
        for stage, corpus in zip(stages_of(config), corpora, strict=True):
            with errors_of_stage(stage.name):
                corpus.check_sequence_length(stage.config.data.sequence_length)
                _check_vocabulary(config, corpus)
                check_corpus(config, corpus)
        if not config.is_length_known:
            plan = plan.with_counted_epochs(corpora[0])
            check_continuation(run_folder, plan.config)
            check_source(plan.config, run_folder)
            if _is_finished(run_folder, plan.config):
                return EXIT_FINISHED
        for sentence in plan.kept:
            print(f"note: {sentence}")
        with StopSignals() as signals:
            exit_code = _run_attempts(plan, run_folder, lease, port, signals)

            def warn(sentence: str) -> None:
                # After a failure the last line is the failing rank's own error.
                if exit_code in (EXIT_FINISHED, EXIT_STOPPED):
                    print_warning(sentence)

            # Rank 0 writes it, unless it died.
            write_run_report(run_folder, warn)
            for line in next_steps(plan.config, run_folder, exit_code):
                print(line)
        return exit_code
    finally:
        lease.release()


def _run_attempts(plan: Plan, run_folder: RunFolder, lease: Lease, port: int, signals: StopSignals) -> int:
    """One attempt after another until one ends the run; returns its exit status."""
    variables = {variable.name: variable.value for variable in plan.variables}
    restarts = Restarts(plan.config.faults, run_folder)
    while True:
        attempt = begin_attempt(run_folder, plan.config, plan.world, sys.argv)
        run_folder.check_attempt_config(plan.config, attempt)
        # Not the user's file, which may be another by now, or have been a pipe.
        command = plan.command(port, [str(run_folder.attempt_config_file(attempt))])
        exit_code = run_ranks(plan.launcher, command, variables, run_folder, attempt, lease.token, signals)
        if run_folder.is_taken_over:
            return exit_code
        ended = restarts.after(attempt, exit_code, signals)
        if ended is not None:
            return ended
        # This process may have stood still meanwhile.
        lease.check()
        # Another process may have taken the port meanwhile.
        port = rendezvous_port(plan.config.launch.master_port)


def _is_finished(run_folder: RunFolder, config: RunConfig) -> bool:
    """Whether nothing is left to train, which is then said."""
    ended = finished(run_folder, config)
    if ended is not None:
        training, checkpoint, reason = ended
        print(
            f"run {config.name} is {complete_at(training.step, reason)}; nothing to do. Its last checkpoint is "
            f"{checkpoint}; to train on, run it with {remedy(training, config, reason)}, say"
        )
    return ended is not None


def _prepared_corpora(config: RunConfig, fingerprints: Mapping[str, str], world: World) -> list[Prepared]:
    """What is prepared of each stage; made in a process of its own, whose libraries this one must not load."""
    found = find_stages(config, fingerprints)
    # Whether sets are prepared is not known without the libraries that prepare them.
    if found is not None and not config.evaluation.sets and config.data.source != "factory":
        return found
    if found is None and config.data.source != "factory":
        # A model that cannot be built is found before hours of reading.
        preview(config, world)
    with tempfile.NamedTemporaryFile("w", prefix="shardline-", suffix=".yaml") as file:
        file.write(config_to_yaml(config))
        file.flush()
        return _prepare(config, file.name)


def _prepare(config: RunConfig, config_file: str) -> list[Prepared]:
    command = module_command("trainer.commands.prepare_data", config_file)
    with start_child(command, os.environ, shielded=False) as child:
        try:
            status = child.wait()
        except KeyboardInterrupt:
            child.kill()
            print_error("interrupted while preparing the corpus; the same command goes on")
            raise SystemExit(EXIT_INTERRUPTED) from None
    found = find_stages(config, {})
    if found is not None and not (status and (config.evaluation.sets or config.data.source == "factory")):
        # Also where the child could not say so, to a reader that is gone.
        return found
    if status > 0:
        # The child has said why.
        raise SystemExit(status)
    if status < 0:
        raise RunFailure(f"preparing the corpus was killed by signal {-status}; run again to go on.")
    raise UserError("the corpus changed while it was being prepared; run again.")


def _check_vocabulary(config: RunConfig, corpus: Prepared) -> None:
    wanted = config.model.config.get("vocab_size")
    if isinstance(wanted, int) and corpus.vocab_size is not None and wanted < corpus.vocab_size:
        raise UserError(
            f"model.config.vocab_size={wanted} is smaller than the tokenizer's {corpus.vocab_size} tokens; "
            f"set it to at least {corpus.vocab_size}, or remove it."
        )
