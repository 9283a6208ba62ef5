"""A program of ``torch.export`` as a file that ONNX Runtime runs."""

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from sharding.ranks.errors import UserError
from trainer.deploy.export_program import first_line, torch_says_nothing, whole_recurrences
from trainer.deploy.signature import TensorSpec

_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def refuse_missing_onnx() -> None:
    """Assert that what writes and runs ONNX is installed.

    Raises:
        UserError: a package is not.
    """
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"--format onnx needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed; "
            "install them with pip install 'shardline[export]'."
        )


def write_onnx(program: ExportedProgram, inputs: list[TensorSpec], outputs: list[TensorSpec], file: Path) -> None:
    """Write a program; weights beyond 2 GB go into a file beside it, for the format holds no more.

    Args:
        program: the program.
        inputs: what it takes, in its order.
        outputs: what it gives.
        file: where to.

    Raises:
        UserError: an operation of the model has no counterpart in ONNX.
    """
    # Comes with onnxscript.
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    try:
        with torch_says_nothing(), whole_recurrences():
            made: Any = torch.onnx.export(
                program,
                input_names=[spec.name for spec in inputs],
                output_names=[spec.name for spec in outputs],
                dynamo=True,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
        raise UserError(
            f"--format onnx cannot hold this model: {first_line(cause)}; give --format torch-export, or --format hf "
            "for a model of transformers."
        ) from None
    # Else the source files of this machine are named at every operation.
    ClearMetadataAndDocStringPass()(made.model)
    made.rename_axes(
        {
            size.value: axis
            for spec, value in zip(inputs, made.model.graph.inputs, strict=True)
            for axis, size in zip(spec.shape, value.shape, strict=True)
            if isinstance(axis, str) and not isinstance(size, int)
        }
    )
    made.save(file, external_data=False)
