"""A checkpoint exported and quantized in one go."""

import tempfile
from pathlib import Path

from sharding.ranks.errors import UserError
from trainer.checkpoint.reader import CheckpointReader
from trainer.config.quantization import QuantizationMethod
from trainer.deploy.export import ExportOptions, export_run
from trainer.deploy.new_folder import refuse_contents
from trainer.deploy.quantization_result import Quantized
from trainer.deploy.quantize import quantize_folder
from trainer.evaluation.reference import reference_of
from trainer.evaluation.subject import Asked, find_subject


def export_quantized(
    reader: CheckpointReader, run: str, to: Path, options: ExportOptions, method: QuantizationMethod
) -> Quantized:
    """Export a checkpoint, and quantize what was exported, as ``shardline quantize`` would.

    Both are compared on what the run holds out: its validation split, or where it has none the test split.

    Args:
        reader: the checkpoint.
        run: the run's folder, or the URL of its checkpoints.
        to: the new folder; what is exported first lies beside it for as long.
        options: of the export.
        method: how weights are quantized.

    Raises:
        UserError: see ``export_run`` and ``quantize_folder``; or adapters alone are asked for, or nothing is held out.
    """
    if options.form == "adapter":
        raise UserError(f"--quantize {method} --adapter: adapters alone are no model; give --merge.")
    if options.sparse:
        raise UserError(f"--quantize {method} --sparse: of rounded weights no bits are kept; leave one out.")
    if options.format == "torch-export":
        raise UserError(
            f"--quantize {method} --format torch-export: the weights are a part of that program; give --format onnx or "
            "hf."
        )
    refuse_contents(to)
    to.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=to.parent, prefix=f".{to.name}.") as folder:
        work = Path(folder)
        export_run(reader, work / "model", options)
        step = reader.manifest.training.step
        asked = Asked(run, step=step, averaged=options.averaged, allowed=options.allowed)
        (work / "samples").mkdir()
        try:
            subject = find_subject(asked, 1, work / "samples")
        except UserError:
            asked = Asked(run, step=step, averaged=options.averaged, split="test", allowed=options.allowed)
            (work / "test").mkdir()
            subject = find_subject(asked, 1, work / "test")
        reference = reference_of(asked, subject)
        return quantize_folder(work / "model", to, method, reference, accept_loss=options.accept_loss)
