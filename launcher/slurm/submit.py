"""``shardline slurm submit``: one of the scripts of ``slurm/``, flags over it, and a frozen copy of what it runs."""

import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from launcher.preview import preview
from launcher.slurm.freeze import SCRIPTS_FOLDER, freeze, new_submission, submissions
from launcher.slurm.partition import USUAL_CPUS_PER_RANK, fitted, partition_nodes
from launcher.slurm.queue import QueuedJob, call, queued_jobs
from launcher.slurm.request import Request
from sharding.ranks.errors import RunFailure, UserError
from trainer.attempt import check_continuation
from trainer.checkpoint.trained_corpus import trained_fingerprints
from trainer.config import RunConfig, load_config
from trainer.config.rules import validate
from trainer.data.prepared_stages import find_stages
from trainer.run_folder.folder import RunFolder

SCRIPTS = {"torchrun": "pretrain.sbatch", "deepspeed": "pretrain_deepspeed.sbatch", "srun": "pretrain_srun.sbatch"}
TASK = "{task}"
# Most CPUs emulate them, several times slower than fp32.
_GPU_PRECISIONS = ("bf16", "fp16", "fp8")
_COMPLETING_S, _LOOK_EVERY_S = 120.0, 2.0
# What it prints with --parsable is the number, and on some sites a semicolon and the cluster's name.
_SUBMIT = """\
#!/bin/bash
# Submits this as it was submitted first; arguments are further options of sbatch, which go before those of then.
set -euo pipefail
{variables}
job=$({sbatch} "$@" {script})
echo "${{job%%;*}}" | tee -a {jobs}
"""


def submit(config_path: str, overrides: Sequence[str], request: Request, dry_run: bool) -> None:
    """Check, freeze and submit a run, and say where to look.

    Raises:
        UserError: something that the user can mend is wrong.
        RunFailure: Slurm refused the job.
    """
    is_array = bool(request.options.get("array"))
    later = [override for override in overrides if TASK in override]
    config = load_config(config_path, [override for override in overrides if TASK not in override])
    _check(config, request, later, is_array)
    name = next((override[5:] for override in later if override.startswith("name=")), config.name)
    run_dir = Path(config.output_dir) / name.replace(TASK, "array")
    # What is wrong with the run counts before what is wrong with the cluster.
    found = preview(config.model_copy(update={"name": run_dir.name}), request.world)
    print("\n".join(found.lines() if found is not None else []), file=sys.stderr)
    scripts = _own_scripts(Path(config_path), request)
    request = _fitted(request, (scripts or SCRIPTS_FOLDER) / SCRIPTS[request.launcher], dry_run)
    if dry_run:
        folder = run_dir.absolute() / "slurm" / "submission-N"
        variables = [f"{name}={value}" for name, value in _variables(folder).items()]
        command = ["env", *variables, *_sbatch(folder, request, name, is_array), *_script(folder, request, later)]
        print(" \\\n  ".join(map(shlex.quote, command)))
        return
    check_continuation(RunFolder(run_dir), config)
    _refuse_second_job(run_dir, request)
    folder = new_submission(run_dir)
    freeze(folder, config, scripts)
    (folder / "submit.sh").write_text(
        _SUBMIT.format(
            variables="\n".join(f"export {name}={shlex.quote(value)}" for name, value in _variables(folder).items()),
            sbatch=shlex.join(_sbatch(folder, request, name, is_array)),
            script=shlex.join(_script(folder, request, later)),
            jobs=shlex.quote(str(folder.parent / "jobs")),
        )
    )
    if scripts is not None:
        print(f"scripts of your own: {scripts}")
        own, ours = scripts / "job.sh", SCRIPTS_FOLDER / "job.sh"
        if own.exists() and own.read_bytes() != ours.read_bytes():
            print(f"note: {own} is not the one of this version; where you have not changed it, copy {ours} over it")
    if find_stages(config, trained_fingerprints(config, RunFolder.of(config))) is None:
        print(
            "the corpus is not prepared yet: the job's first node does it, while the others wait; to have it done "
            f"before, cancel the job and run shardline data prepare {shlex.join([config_path, *overrides])}"
        )
    start(run_dir, folder)


def start(run_dir: Path, folder: Path) -> str:
    """Submit what a folder holds; returns the job's number."""
    job = call(["bash", str(folder / "submit.sh")]).strip()
    print(f"submitted job {job}: {run_dir}")
    print(f"  what runs   {run_dir / 'slurm' / folder.name}")
    print(f"  status      shardline slurm status {run_dir}")
    print(f"  output      shardline slurm logs {run_dir} --follow")
    return job


def resubmit(run_dir: Path) -> None:
    """Submit a run's newest submission again, with the code and the configuration of then.

    Raises:
        UserError: there is none, or a job of the run is still there.
    """
    found = submissions(run_dir)
    if not found or not (found[-1] / "submit.sh").exists():
        raise UserError(f"{run_dir} was never submitted; use shardline slurm submit CONFIG.")
    _refuse_second_job(run_dir, None)
    start(run_dir, found[-1])


def jobs_of(run_dir: Path) -> list[str]:
    """Numbers of the jobs that were submitted for a run, oldest first."""
    try:
        return (run_dir / "slurm" / "jobs").read_text().split()
    except FileNotFoundError:
        return []


def _check(config: RunConfig, request: Request, later: Sequence[str], is_array: bool) -> None:
    if request.launcher not in SCRIPTS:
        raise UserError(f"--launcher {request.launcher} is not known; choose one of {', '.join(SCRIPTS)}.")
    if request.num_gpus and request.ntasks_per_node not in (None, request.num_gpus):
        raise UserError(
            f"--ntasks-per-node {request.ntasks_per_node} does not fit --gpus-per-node {request.gpus_per_node}: each "
            "GPU has one rank; leave --ntasks-per-node out."
        )
    if is_array and not any(override.startswith("name=") for override in later):
        raise UserError(
            f"every task of --array {request.options['array']} would train the same run; put {TASK} into its name, "
            f"name={config.name}-{TASK} say."
        )
    if later and not is_array:
        raise UserError(f"{later[0]} has a meaning with --array only; add --array, or take {TASK} out.")
    compute = config.precision.compute
    if request.gpus_per_node is None and compute in _GPU_PRECISIONS:
        raise UserError(
            f"precision.compute={compute} is for GPUs, but --gpus-per-node is not given, and the job would train on "
            "CPUs; add --gpus-per-node, or --gpus-per-node 0 where that is meant."
        )
    validate(config, request.world)
    configured = config.launch.nproc_per_node
    if configured and configured != request.ranks_per_node:
        raise UserError(
            f"launch.nproc_per_node={configured} does not fit the {request.ranks_per_node} ranks that you ask for on "
            "each node; remove it, or ask for as many."
        )


def _refuse_second_job(run_dir: Path, request: Request | None) -> None:
    if request is not None and request.options.get("dependency"):
        return
    known = _queue_once_ended(run_dir)
    for job in reversed(jobs_of(run_dir)):
        active = [number for number, state in known.items() if _is_of(number, job) and state.is_active]
        if active:
            raise UserError(
                f"{run_dir} has job {active[0]} already ({known[active[0]].state}); cancel it with shardline slurm "
                f"cancel {run_dir}, or let another follow with --dependency afterany:{job}."
            )


def _queue_once_ended(run_dir: Path) -> dict[str, QueuedJob]:
    """All jobs, once a job of the run that was cancelled a moment ago, and may still save, has ended."""
    own, deadline, said = jobs_of(run_dir), time.monotonic() + _COMPLETING_S, False
    while True:
        known = queued_jobs()
        ending = [job for job, entry in known.items() if entry.state == "COMPLETING" and job.partition("_")[0] in own]
        if not ending or time.monotonic() > deadline:
            return known
        if not said:
            print(f"waiting for job {ending[0]} to end", flush=True)
        said = True
        time.sleep(_LOOK_EVERY_S)


def _is_of(number: str, job: str) -> bool:
    return number == job or number.startswith(f"{job}_")


def _script(folder: Path, request: Request, later: Sequence[str]) -> list[str]:
    return [str(folder / "code" / "slurm" / SCRIPTS[request.launcher]), str(folder / "config.yaml"), *later]


def _own_scripts(config_path: Path, request: Request) -> Path | None:
    """The folder of scripts that ``shardline init`` copied, with what their owner has written for the site."""
    for folder in (Path("slurm").absolute(), config_path.absolute().parent.parent / "slurm"):
        if (folder / SCRIPTS[request.launcher]).is_file() and not folder.samefile(SCRIPTS_FOLDER):
            return folder
    return None


def _fitted(request: Request, script: Path, dry_run: bool) -> Request:
    """The request with what is missing in it, held against the nodes that are there."""
    try:
        nodes = partition_nodes(request, script)
    except (UserError, RunFailure):
        if not dry_run:
            raise
        # To look at a command no cluster is needed.
        nodes = []
        if request.cpus_per_rank is None:
            print(f"note: no Slurm to ask: {USUAL_CPUS_PER_RANK} CPUs a rank are a guess", file=sys.stderr)
    return fitted(request, nodes)


def _variables(folder: Path) -> dict[str, str]:
    """What the job's environment has beyond the submitter's own."""
    code = folder / "code"
    own_path = f":{os.environ['PYTHONPATH']}" if os.environ.get("PYTHONPATH") else ""
    return {
        # The copy before all else, and never the folder that the job starts in, which may hold newer code.
        "PYTHONPATH": f"{code}{own_path}",
        "PYTHONSAFEPATH": "1",
        # For a job without a container, which has a Python of its own.
        "SHARDLINE_HOST_PYTHON": sys.executable,
        "SHARDLINE_RESUBMIT": str(folder / "submit.sh"),
    }


def _sbatch(folder: Path, request: Request, name: str, is_array: bool) -> list[str]:
    tasks, cpus = request.tasks_per_node, request.cpus_per_rank or USUAL_CPUS_PER_RANK
    options = {
        "nodes": str(request.nodes),
        "gpus-per-node": request.gpus_per_node if request.num_gpus else None,
        "ntasks-per-node": str(tasks),
        "cpus-per-task": str(cpus * request.ranks_per_node // tasks),
        "job-name": name.replace(TASK, "array"),
        "output": str(folder.parent / f"job-{'%A_%a' if is_array else '%j'}.out"),
        # Relative paths in the configuration mean the same, from wherever it is submitted again.
        "chdir": os.getcwd(),
        # Not with their values: sbatch would end one at its first comma.
        "export": "ALL",
        **request.options,
    }
    given = [f"--{option}={value}" for option, value in options.items() if value is not None]
    return ["sbatch", "--parsable", *given, *request.further]
