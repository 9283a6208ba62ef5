"""The commands of ``shardline``; those that need torch are declared in ``trainer.commands``."""

import shutil
from pathlib import Path
from typing import Annotated

import typer

from launcher.forwarding import Doctor, Forwarded, become
from launcher.slurm.commands import app as slurm_app
from sharding.ranks.errors import UserError
from trainer.commands.arguments import HELP_OPTIONS, Config, NprocPerNode, Overrides, expanded
from trainer.commands.checkpoint_list import checkpoint_list
from trainer.commands.checkpoint_verify import checkpoint_verify
from trainer.commands.dashboard import dashboard
from trainer.commands.doctor import doctor
from trainer.commands.evaluate import evaluate
from trainer.commands.export import export
from trainer.commands.generate import generate
from trainer.commands.list_runs import list_runs
from trainer.commands.parity import parity
from trainer.commands.prepare_data import prepare_data
from trainer.commands.prune import prune
from trainer.commands.quantize import quantize
from trainer.commands.report import report
from trainer.commands.serve import serve
from trainer.commands.show_data import show_data
from trainer.commands.sync import sync

app = typer.Typer(
    help="Pretrain transformers on one machine or many: every rank in step, every claim checkable on a laptop.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings=HELP_OPTIONS,
)
data_app = typer.Typer(help="Prepare a corpus, or look at what a step trains on.", no_args_is_help=True)
checkpoint_app = typer.Typer(help="List and verify a run's checkpoints.", no_args_is_help=True)
app.add_typer(data_app, name="data")
app.add_typer(checkpoint_app, name="checkpoint")
tracking_app = typer.Typer(help="Upload what was tracked offline, or build the wandb dashboard.", no_args_is_help=True)
app.add_typer(tracking_app, name="tracking")
app.add_typer(slurm_app, name="slurm")

_BENCHMARKS = {
    "throughput": "tokens/s, technique by technique",
    "scaling": "over ranks and nodes, beside its peers",
    "collectives": "bandwidth by size and link",
    "memory": "bytes per rank beside the formula",
    "data": "loader, tokenizer, a huge corpus",
    "overhead": "a step beside its peers'",
    "checkpoint": "saving and loading",
    "startup": "from the command to the first step",
    "quality": "how well the examples learn, over several seeds",
    "serving": "requests/s and what is lost, beside other servers",
    "all": "all of them, and the report",
    "report": "the newest results on one page",
}
_EXAMPLES = ("configs", "slurm")
_EXAMPLE_SUFFIXES = (".yaml", ".sbatch", ".sh", ".md")


def _show_version(is_asked: bool) -> None:
    if is_asked:
        from trainer.run_folder.provenance import describe_version

        typer.echo(describe_version())
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Options that come before a command."""


@app.command()
def init(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Where to copy them; created if need be.", callback=expanded)
    ],
) -> None:
    """Copy the example configurations and Slurm scripts into a folder of your own."""
    root = Path(__file__).resolve().parent.parent
    sources = [source for name in _EXAMPLES for source in sorted((root / name).rglob("*")) if _is_example(source)]
    if not sources:
        raise UserError(
            f"{root} holds no {' and no '.join(_EXAMPLES)}: the installation is not whole; install it again."
        )
    targets = [folder / source.relative_to(root) for source in sources]
    for target in targets:
        if target.exists():
            raise UserError(f"{target} exists; choose another folder, nothing was written.")
    for source, target in zip(sources, targets, strict=True):
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)
        typer.echo(target)


@app.command()
def run(
    config: Config,
    overrides: Overrides = None,
    nproc_per_node: NprocPerNode = None,
    launcher: Annotated[str, typer.Option(help="torchrun, deepspeed or accelerate.")] = "torchrun",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check and show what would be started, and start nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --dry-run: one JSON document, for programs.")] = False,
) -> None:
    """Train, or continue, a run: all GPUs of this machine, or two processes on a CPU. `train` is another name of it.

    Ctrl-C once saves and stops with exit status 75; the same command continues.
    """
    from launcher.run import run as run_config

    if as_json and not dry_run:
        raise UserError("--json is for what --dry-run shows; add --dry-run, or leave --json out.")
    raise typer.Exit(run_config(config, overrides or [], nproc_per_node, launcher, dry_run, as_json))


app.command("train", hidden=True)(run)


@app.command()
def drill(
    name: Annotated[str, typer.Argument(help="A drill's name, or all; a wrong name lists them.", metavar="NAME")],
    config: Config,
    overrides: Overrides = None,
    nproc_per_node: NprocPerNode = None,
    folder: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where runs and results go; runs/drills/NAME.", callback=expanded)
    ] = None,
) -> None:
    """Trigger a fault in a short run and prove that it ends as the undisturbed run does; exit status 1 if not."""
    from launcher.drills.catalogue import run_drills

    raise typer.Exit(run_drills(name, config, overrides or [], nproc_per_node, folder))


app.command("list", cls=Forwarded)(list_runs)
app.command(cls=Doctor)(doctor)
app.command(cls=Forwarded)(parity)
app.command(cls=Forwarded)(evaluate)
app.command(cls=Forwarded)(export)
app.command(cls=Forwarded)(prune)
app.command(cls=Forwarded)(generate)
app.command(cls=Forwarded)(quantize)
app.command(cls=Forwarded)(report)
app.command(cls=Forwarded)(serve)


@app.command(context_settings={"ignore_unknown_options": True})
def bench(
    name: Annotated[
        str,
        typer.Argument(
            help="; ".join(f"{name}: {what}" for name, what in _BENCHMARKS.items()) + ".",
            metavar="NAME",
        ),
    ],
    arguments: Annotated[
        list[str] | None, typer.Argument(help="Options of that benchmark; `-- --help` names them.")
    ] = None,
) -> None:
    """Run a benchmark."""
    if name not in _BENCHMARKS:
        raise UserError(f"there is no benchmark {name}; there are: {', '.join(_BENCHMARKS)}.")
    become("benchmarks.presentation.report" if name == "report" else f"benchmarks.{name}", *(arguments or []))


@app.command(context_settings={"ignore_unknown_options": True})
def tune(
    config: Config,
    arguments: Annotated[
        list[str] | None, typer.Argument(help="Settings, and options; `-- --help` names them.", metavar="key=value")
    ] = None,
) -> None:
    """Search micro-batch, strategy, recomputation and compilation for speed within memory; what is trained stays."""
    become("benchmarks.tune", config, *(arguments or []))


data_app.command("prepare", cls=Forwarded)(prepare_data)
data_app.command("show", cls=Forwarded)(show_data)
checkpoint_app.command("list", cls=Forwarded)(checkpoint_list)
checkpoint_app.command("verify", cls=Forwarded)(checkpoint_verify)
tracking_app.command("sync", cls=Forwarded)(sync)
tracking_app.command("dashboard", cls=Forwarded)(dashboard)


def _is_example(source: Path) -> bool:
    return source.is_file() and source.suffix in _EXAMPLE_SUFFIXES
