"""The commands of ``shardline``; those that need torch become another process."""

import os
import shutil
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from launcher.arguments import expanded
from launcher.import_path import import_variables, module_command
from launcher.slurm.commands import app as slurm_app
from sharding.ranks.errors import UserError

app = typer.Typer(
    help="Pretrain transformers on one machine or many: every rank in step, every claim checkable on a laptop.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
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
    "all": "all of them, and the report",
    "report": "the newest results on one page",
}
_EXAMPLES = ("configs", "slurm")
_EXAMPLE_SUFFIXES = (".yaml", ".sbatch", ".sh", ".md")

Config = Annotated[str, typer.Argument(help="YAML file of the run.", metavar="CONFIG", callback=expanded)]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Settings, such as optimizer.lr=1e-3.", metavar="key=value")
]
Run = Annotated[str, typer.Argument(help="Folder of a run, output_dir/name.", metavar="RUN", callback=expanded)]
Step = Annotated[int | None, typer.Option(help="Step of the checkpoint; the newest if not given.")]
Average = Annotated[bool, typer.Option("--ema", help="Take the moving average of the weights.")]
OwnTask = Annotated[
    str | None, typer.Option("--task", metavar="module:Class", help="Import the run's own task: Python code.")
]
RemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run the model's own Python code.")]


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
    nproc_per_node: Annotated[int | None, typer.Option(min=1, help="Ranks on this machine.")] = None,
    launcher: Annotated[str, typer.Option(help="torchrun, deepspeed or accelerate.")] = "torchrun",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be started, and start nothing.")] = False,
) -> None:
    """Train, or continue, a run: all GPUs of this machine, or two processes on a CPU.

    Ctrl-C once saves and stops with exit status 75; the same command continues.
    """
    from launcher.run import run as run_config

    raise typer.Exit(run_config(config, overrides or [], nproc_per_node, launcher, dry_run))


@app.command()
def drill(
    name: Annotated[str, typer.Argument(help="A drill's name, or all; a wrong name lists them.", metavar="NAME")],
    config: Config,
    overrides: Overrides = None,
    nproc_per_node: Annotated[int | None, typer.Option(min=1, help="Ranks on this machine.")] = None,
    folder: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where runs and results go; runs/drills/NAME.", callback=expanded)
    ] = None,
) -> None:
    """Trigger a fault in a short run and prove that it ends as the undisturbed run does; exit status 1 if not."""
    from launcher.drills.catalogue import run_drills

    raise typer.Exit(run_drills(name, config, overrides or [], nproc_per_node, folder))


@app.command()
def doctor(
    config: Annotated[
        str | None,
        typer.Argument(
            help="YAML file of a run, whose folder is to be looked at.", metavar="CONFIG", callback=expanded
        ),
    ] = None,
    overrides: Overrides = None,
    nproc_per_node: Annotated[int | None, typer.Option(min=1, help="Ranks on this machine.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs: all that was measured.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Measure with smaller products, messages and files.")] = False,
) -> None:
    """Examine this machine, or all of an allocation, before training on it; exit status 1 if something fails.

    Under srun or torchrun each task is a rank: srun shardline doctor CONFIG.
    """
    from launcher.doctor import run_doctor

    arguments = [*([config] if config else []), *(overrides or [])]
    options = [*(["--json"] if as_json else []), *(["--quick"] if quick else [])]
    raise typer.Exit(run_doctor([*arguments, *options], nproc_per_node))


@app.command()
def parity(config: Config, overrides: Overrides = None) -> None:
    """Prove that every backend, strategy and optimizer trains as one plain process does; exit status 1 if not."""
    _become("trainer.commands.parity", config, *(overrides or []))


@app.command()
def export(
    run_folder: Run,
    to: Annotated[Path, typer.Option(metavar="DIR", help="New folder for the model.", callback=expanded)],
    step: Step = None,
    ema: Average = False,
    task: OwnTask = None,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Write a checkpoint as a model and tokenizer that transformers loads."""
    _become(
        "trainer.commands.export",
        run_folder,
        "--to",
        str(to),
        *_option("--step", step),
        *(["--ema"] if ema else []),
        *_option("--task", task),
        *(["--trust-remote-code"] if trust_remote_code else []),
    )


@app.command()
def generate(
    run_folder: Annotated[
        str, typer.Argument(help="Folder of a run or of an exported model.", metavar="RUN", callback=expanded)
    ],
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens to add at most; 120, or what the model's positions leave.")
    ] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token each time.")] = 0.8,
    top_k: Annotated[int, typer.Option(min=0, help="Choose among this many likeliest tokens; 0 means all.")] = 50,
    seed: Annotated[int, typer.Option(help="Seed of the choice.")] = 0,
    step: Step = None,
    ema: Average = False,
    task: OwnTask = None,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Continue a text with a run's model."""
    _become(
        "trainer.commands.generate",
        run_folder,
        f"--prompt={prompt}",
        *_option("--max-new-tokens", max_new_tokens),
        *_option("--temperature", temperature),
        *_option("--top-k", top_k),
        *_option("--seed", seed),
        *_option("--step", step),
        *(["--ema"] if ema else []),
        *_option("--task", task),
        *(["--trust-remote-code"] if trust_remote_code else []),
    )


@app.command()
def report(
    run_folders: Annotated[
        list[str], typer.Argument(help="Folders of runs, output_dir/name.", metavar="RUN [RUN ...]", callback=expanded)
    ],
    to: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Page to write; RUN/report.html, or comparison.html for several runs.",
            callback=expanded,
        ),
    ] = None,
) -> None:
    """Write a run's page of plots for a browser, or one that compares several runs."""
    _become("trainer.report", *run_folders, *_option("--to", to))


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
    _become("benchmarks.presentation.report" if name == "report" else f"benchmarks.{name}", *(arguments or []))


@app.command(context_settings={"ignore_unknown_options": True})
def tune(
    config: Config,
    arguments: Annotated[
        list[str] | None, typer.Argument(help="Settings, and options; `-- --help` names them.", metavar="key=value")
    ] = None,
) -> None:
    """Search micro-batch, strategy, recomputation and compilation for speed within memory; what is trained stays."""
    _become("benchmarks.tune", config, *(arguments or []))


@data_app.command("prepare")
def data_prepare(config: Config, overrides: Overrides = None) -> None:
    """Clean, tokenise and pack a run's corpus; done already means done at once."""
    _become("trainer.commands.prepare_data", config, *(overrides or []))


@data_app.command("show")
def data_show(
    run_folder: Run,
    step: Annotated[int, typer.Option(min=1, help="Optimizer step, from 1.")],
    limit: Annotated[int, typer.Option(min=0, help="Samples to show; 0 means all of the step.")] = 0,
) -> None:
    """Show the documents and the text that a step trains on."""
    _become("trainer.commands.show_data", run_folder, *_option("--step", step), *_option("--limit", limit))


@checkpoint_app.command("list")
def checkpoint_list(run_folder: Run) -> None:
    """Show a run's checkpoints."""
    _become("trainer.commands.checkpoints", "list", run_folder)


@checkpoint_app.command("verify")
def checkpoint_verify(run_folder: Run) -> None:
    """Compare every file of a run's checkpoints with its manifest; exit status 2 if one is corrupt."""
    _become("trainer.commands.checkpoints", "verify", run_folder)


@tracking_app.command("sync")
def tracking_sync(
    run_folders: Annotated[list[str], typer.Argument(help="Folders of runs.", metavar="RUN...", callback=expanded)],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show parts and commands, and upload nothing.")] = False,
) -> None:
    """Join the offline parts of a run's attempts into its one wandb run."""
    _become("trainer.commands.sync", *run_folders, *(["--dry-run"] if dry_run else []))


@tracking_app.command("dashboard")
def tracking_dashboard(
    source: Annotated[
        str | None, typer.Argument(help="Whose wandb project it is for.", metavar="CONFIG|RUN", callback=expanded)
    ] = None,
    save: Annotated[bool, typer.Option("--save", help="Save it to the wandb server.")] = False,
) -> None:
    """Show the report's plots as a wandb workspace, in JSON, or save it."""
    _become("trainer.commands.dashboard", *([] if source is None else [source]), *(["--save"] if save else []))


def _is_example(source: Path) -> bool:
    return source.is_file() and source.suffix in _EXAMPLE_SUFFIXES


def _option(name: str, value: object) -> list[str]:
    return [] if value is None else [f"{name}={value}"]


def _become(module: str, *arguments: str) -> NoReturn:
    """Replace this process by a module that loads torch; the launcher itself stays light."""
    sys.stdout.flush()
    # Through another module, for a person may interrupt it while it imports torch.
    command = module_command("sharding.ranks.quiet_end", module, *arguments)
    environment = {**os.environ, **import_variables(os.environ)}
    os.execve(command[0], command, environment)  # noqa: S606 - no shell is what we want
