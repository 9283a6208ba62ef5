"""``shardline quantize``: an exported model with weights of fewer bits, compared with what it was made of."""

import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from trainer.commands.arguments import AsJson, OwnFactories, OwnTask, RemoteCode, expanded
from trainer.commands.entry import entry
from trainer.config.quantization import QuantizationMethod


def quantize(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="What shardline export has written.", callback=expanded)
    ],
    to: Annotated[Path, typer.Option(metavar="DIR", help="New folder for the model.", callback=expanded)],
    method: Annotated[
        QuantizationMethod,
        typer.Option(help="Weights in 8 or 4 bits; int8-dynamic also rounds what they are multiplied with."),
    ],
    run: Annotated[
        str | None,
        typer.Option(metavar="RUN", help="Compare on what this run has held out.", callback=expanded),
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="Of the run: train, validation or test; validation if not given.")
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE", help="Compare on this file, or several, in place of a split.", callback=expanded),
    ] = None,
    accept_loss: Annotated[
        bool, typer.Option("--accept-loss", help="Keep the model though its metric is worse by more than 0.5 points.")
    ] = False,
    as_json: AsJson = False,
    task: OwnTask = None,
    factory: OwnFactories = None,
    trust_remote_code: RemoteCode = False,
) -> int:
    """Write an exported model once more with weights of fewer bits, and say what that does to it.

    Size, speed and quality on held-out samples are shown beside those of the model that it is made of.
    """
    from rich.console import Console

    from sharding.ranks.errors import EXIT_FINISHED, UserError
    from trainer.deploy.allowed_code import AllowedCode
    from trainer.deploy.quantization_result import print_quantized, quantized_values
    from trainer.deploy.quantize import quantize_folder
    from trainer.evaluation.reference import reference_of
    from trainer.evaluation.subject import Asked, find_subject
    from trainer.runtime.json_output import output_aside, print_json

    if run is None and not data:
        raise UserError(
            f"shardline quantize {folder} compares both models on samples that were not trained on; name the run that "
            "has held some out by --run, or files by --data."
        )
    if split is not None and data:
        raise UserError(f"--split {split} and --data {' '.join(data)} name both what is compared on; leave one out.")
    asked = Asked(
        run=run or str(folder),
        split=split or "validation",
        files=tuple(data or ()),
        allowed=AllowedCode(task, trust_remote_code, tuple(factory or ())),
    )
    with output_aside(as_json), tempfile.TemporaryDirectory(prefix="shardline-quantize-") as work:
        reference = reference_of(asked, find_subject(asked, 1, Path(work)))
        quantized = quantize_folder(folder, to, method, reference, accept_loss=accept_loss)
    if as_json:
        print_json({"folder": str(folder), "to": str(to)} | quantized_values(quantized))
        return EXIT_FINISHED
    print_quantized(quantized, Console(width=None if sys.stdout.isatty() else 120, highlight=False))
    print(f"quantized {folder} by {method} into {to}")
    return EXIT_FINISHED


main = entry(quantize)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
