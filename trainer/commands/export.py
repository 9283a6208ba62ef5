"""``shardline export``: a checkpoint as a folder for `transformers`, ONNX Runtime or ``torch.export``."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from trainer.commands.arguments import Average, OwnFactories, OwnTask, RemoteCode, Run, Step, expanded
from trainer.commands.entry import entry
from trainer.config.quantization import QuantizationMethod
from trainer.deploy.signature import Dtype, Format


def export(
    run_folder: Run,
    to: Annotated[Path, typer.Option(metavar="DIR", help="New folder for the model.", callback=expanded)],
    file_format: Annotated[
        Format,
        typer.Option("--format", help="hf: for transformers; onnx: ONNX Runtime; torch-export: torch.export.load."),
    ] = "hf",
    dtype: Annotated[Dtype, typer.Option(help="Format of the weights.")] = "fp32",
    quantize: Annotated[
        QuantizationMethod | None,
        typer.Option(help="Quantize what is exported, as shardline quantize --method does."),
    ] = None,
    accept_loss: Annotated[
        bool,
        typer.Option("--accept-loss", help="Write it also where it is less good than what was trained, or unknown."),
    ] = False,
    sparse: Annotated[
        bool, typer.Option("--sparse", help="Of a pruned run: a bit for each weight, and those that are not zero.")
    ] = False,
    step: Step = None,
    ema: Average = False,
    adapter: Annotated[
        bool, typer.Option("--adapter", help="Of a run with LoRA: its adapters alone, which peft loads.")
    ] = False,
    merge: Annotated[
        bool, typer.Option("--merge", help="Of a run with LoRA: the whole model, adapters added to the weights.")
    ] = False,
    task: OwnTask = None,
    factory: OwnFactories = None,
    trust_remote_code: RemoteCode = False,
) -> int:
    """Write a checkpoint as a model that other programs load, once it computes there what was trained."""
    from sharding.ranks.errors import EXIT_FINISHED, UserError
    from trainer.checkpoint.reader import open_checkpoint
    from trainer.deploy.allowed_code import AllowedCode
    from trainer.deploy.export import ExportOptions, export_run

    if adapter and merge:
        raise UserError("--adapter and --merge name two forms of an export; leave one out.")
    reader = open_checkpoint(run_folder, step)
    options = ExportOptions(
        format=file_format,
        dtype=dtype,
        averaged=ema,
        allowed=AllowedCode(task, trust_remote_code, tuple(factory or ())),
        form="adapter" if adapter else "merged" if merge else None,
        accept_loss=accept_loss,
        sparse=sparse,
    )
    if quantize is not None:
        from rich.console import Console

        from trainer.deploy.quantization_result import print_quantized
        from trainer.evaluation.quantized_export import export_quantized

        quantized = export_quantized(reader, run_folder, to, options, quantize)
        print_quantized(quantized, Console(width=None if sys.stdout.isatty() else 120, highlight=False))
        print(f"exported step {reader.manifest.training.step} of {run_folder} by {quantize} to {to}")
        return EXIT_FINISHED
    deployment = export_run(reader, to, options)
    part = "the adapters of " if adapter else ""
    average = "the averaged weights of " if ema else ""
    print(f"exported {part}{average}step {reader.manifest.training.step} of {run_folder} to {to}")
    if deployment is not None:
        print("not compared with the trained model" if deployment.quality is None else deployment.quality.in_words())
    source = reader.manifest.config["checkpoint"].get("from")
    if adapter and source is not None:
        print(f"they stand beside the model of {source}: export that, and give it to PeftModel.from_pretrained")
    return EXIT_FINISHED


main = entry(export)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
