"""``shardline evaluate``: the metrics of a run's checkpoint, or of an exported model, on a split or on files."""

import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from trainer.commands.arguments import AsJson, Average, NprocPerNode, OwnFactories, OwnTask, RemoteCode, Step, expanded
from trainer.commands.entry import entry


def evaluate(
    run_folder: Annotated[
        str, typer.Argument(help="Folder of a run or of an exported model.", metavar="RUN", callback=expanded)
    ],
    split: Annotated[
        str | None,
        typer.Option(
            help="train, validation or test of the run's data, or one of its evaluation.sets; validation if not given."
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE", help="Evaluate on this file, or several, in place of a split.", callback=expanded),
    ] = None,
    step: Step = None,
    ema: Average = False,
    nproc_per_node: NprocPerNode = None,
    as_json: AsJson = False,
    task: OwnTask = None,
    factory: OwnFactories = None,
    trust_remote_code: RemoteCode = False,
) -> int:
    """Evaluate a checkpoint or an exported model on held-out samples or on files of your own; changes no run.

    Files are read as the run reads its own: its tokenizer, normalisation and classes.
    """
    from rich.console import Console

    from sharding.ranks.errors import EXIT_FINISHED, UserError
    from trainer.deploy.allowed_code import AllowedCode
    from trainer.evaluation.on_ranks import default_num_ranks, evaluate_subject
    from trainer.evaluation.subject import Asked, find_subject
    from trainer.evaluation.table import print_result
    from trainer.runtime.json_output import output_aside, print_json

    if split is not None and data:
        raise UserError(f"--split {split} and --data {' '.join(data)} name both what is evaluated on; leave one out.")
    num_ranks = nproc_per_node or default_num_ranks()
    asked = Asked(
        run=run_folder,
        step=step,
        averaged=ema,
        split=split or "validation",
        files=tuple(data or ()),
        allowed=AllowedCode(task, trust_remote_code, tuple(factory or ())),
    )
    with output_aside(as_json), tempfile.TemporaryDirectory(prefix="shardline-evaluate-") as folder:
        subject = find_subject(asked, num_ranks, Path(folder))
        result = evaluate_subject(subject, num_ranks, Path(folder))
    of_step = {} if subject.step is None else {"step": subject.step, "averaged": ema}
    if as_json:
        of_run = {"run": run_folder, **of_step, "data": subject.source, "ranks": num_ranks}
        print_json(of_run | result)
        return EXIT_FINISHED
    place = run_folder if subject.step is None else f"step {subject.step} of {run_folder}"
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    print_result(result, f"{place} on {subject.source}: {result['samples']:,} samples", console)
    return EXIT_FINISHED


main = entry(evaluate)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
