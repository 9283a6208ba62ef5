"""``shardline slurm``: submit runs, and look after them."""

from pathlib import Path
from typing import Annotated

import typer

from trainer.commands.arguments import AsJson, Config, expanded

app = typer.Typer(help="Submit runs to Slurm, and look after them.", no_args_is_help=True)

RunDir = Annotated[Path, typer.Argument(help="Folder of a run, output_dir/name.", metavar="RUN", callback=expanded)]
Text = str | None


@app.command()
def submit(
    config: Config,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            help="Settings; {task} is the number of an array's task. Options of sbatch go after --.",
            metavar="key=value",
        ),
    ] = None,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes.")] = 1,
    gpus_per_node: Annotated[
        Text, typer.Option(help="GPUs of each node, and so its ranks: 4, or h100:4; 0: CPUs.", metavar="[KIND:]NUMBER")
    ] = None,
    ntasks_per_node: Annotated[int | None, typer.Option(min=1, help="Ranks of each node without GPUs.")] = None,
    cpus_per_rank: Annotated[
        int | None, typer.Option(min=1, help="CPUs for each rank; what the nodes have for each GPU if not given.")
    ] = None,
    launcher: Annotated[str, typer.Option(help="torchrun, deepspeed or srun.")] = "torchrun",
    time: Annotated[Text, typer.Option(help="Time limit, such as 12:00:00.")] = None,
    partition: Annotated[Text, typer.Option(help="Partition.")] = None,
    account: Annotated[Text, typer.Option(help="Account.")] = None,
    qos: Annotated[Text, typer.Option(help="Quality of service.")] = None,
    constraint: Annotated[Text, typer.Option(help="Features that nodes must have.")] = None,
    exclude: Annotated[Text, typer.Option(help="Nodes to keep away from.")] = None,
    reservation: Annotated[Text, typer.Option(help="Reservation.")] = None,
    mem: Annotated[Text, typer.Option(help="Memory of each node.")] = None,
    dependency: Annotated[Text, typer.Option(help="What must come first, such as afterany:123.")] = None,
    array: Annotated[Text, typer.Option(help="Tasks of a sweep, such as 0-7%2; each is a run of its own.")] = None,
    signal: Annotated[Text, typer.Option(help="Warning before the end, such as B:USR1@300.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the command, and submit nothing.")] = False,
) -> None:
    """Freeze configuration and code into the run's folder, and submit a job that trains and goes on by itself."""
    from launcher.slurm.request import Request, split_arguments, with_further
    from launcher.slurm.submit import submit as submit_run

    options = {
        "time": time,
        "partition": partition,
        "account": account,
        "qos": qos,
        "constraint": constraint,
        "exclude": exclude,
        "reservation": reservation,
        "mem": mem,
        "dependency": dependency,
        "array": array,
        "signal": signal,
    }
    request = Request(nodes, gpus_per_node, ntasks_per_node, cpus_per_rank, launcher, options)
    settings, further = split_arguments(overrides or [])
    submit_run(config, settings, with_further(request, further), dry_run)


@app.command()
def status(
    folders: Annotated[
        list[Path] | None,
        typer.Argument(help="Runs, or folders full of them; runs/ if none.", metavar="RUN", callback=expanded),
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Show it again every few seconds.")] = False,
    every: Annotated[float, typer.Option(min=1.0, help="Seconds between two looks.")] = 30.0,
    as_json: AsJson = False,
) -> None:
    """Show what submitted runs are doing."""
    from launcher.slurm.status import show_status

    show_status(folders or [Path("runs")], every if watch else 0.0, as_json)


@app.command()
def logs(
    run_folder: RunDir,
    rank: Annotated[int | None, typer.Option(min=0, help="A rank's own log, instead of the job's output.")] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as it grows, also through restarts.")] = False,
) -> None:
    """Show the output of a run's newest job."""
    from launcher.slurm.status import show_logs

    show_logs(run_folder, rank, follow)


@app.command()
def cancel(
    run_folder: RunDir,
    now: Annotated[bool, typer.Option("--now", help="End it without waiting until it has saved.")] = False,
) -> None:
    """Let a run's job save and stop, or take it out of the queue."""
    from launcher.slurm.status import cancel as cancel_run

    cancel_run(run_folder, now)


@app.command()
def resubmit(run_folder: RunDir) -> None:
    """Submit a run again, with the code and the configuration of its newest submission."""
    from launcher.slurm.submit import resubmit as resubmit_run

    resubmit_run(run_folder)
