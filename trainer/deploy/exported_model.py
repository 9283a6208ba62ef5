"""An exported model in its own runtime: ONNX Runtime, ``torch.export.load`` or `from_pretrained`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sharding.ranks.errors import UserError
from trainer.deploy.export_program import LOGITS, first_line, torch_says_nothing
from trainer.deploy.hf_folder import refuse_faults
from trainer.deploy.model_call import Compute, ModelCall
from trainer.deploy.signature import Deployment
from trainer.deploy.trained_model import TrainedModel


def open_exported(folder: Path, deployment: Deployment, trained: TrainedModel, call: ModelCall) -> Compute:
    """Load an exported model, from its files alone.

    Args:
        folder: the exported one.
        deployment: what it holds.
        trained: what it was exported from, for the class of a model of transformers.
        call: arguments beside the inputs that such a model is called with.

    Raises:
        UserError: its runtime cannot run it.
    """
    if deployment.format == "onnx":
        return open_onnx(folder, deployment)
    if deployment.format == "torch-export":
        with torch_says_nothing():
            program = torch.export.load(folder / deployment.file).module()
        return lambda inputs: program(**inputs)
    return _open_hf(folder, trained, call)


def open_onnx(folder: Path, deployment: Deployment) -> Compute:
    """A session of ONNX Runtime on the CPU, with as many threads as torch has.

    Raises:
        UserError: it has no kernel for an operation, or the file is damaged.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(folder / deployment.file, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # noqa: BLE001 - its exceptions have no class of their own in common
        raise UserError(
            f"onnxruntime cannot run {deployment.file} in {deployment.dtype}: {first_line(error)}; give another "
            "--dtype, or --format torch-export."
        ) from None

    def compute(inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        given = {spec.name: inputs[spec.name].contiguous().numpy() for spec in deployment.inputs}
        try:
            return torch.from_numpy(session.run([LOGITS], given)[0])
        except Exception as error:  # noqa: BLE001 - as above
            shapes = ", ".join(f"{name} of shape {list(array.shape)}" for name, array in given.items())
            raise UserError(
                f"onnxruntime cannot compute {deployment.file} on {shapes}: {first_line(error)}; give --format "
                "torch-export, or --format hf for a model of transformers."
            ) from None

    return compute


def _open_hf(folder: Path, trained: TrainedModel, call: ModelCall) -> Compute:
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    kind: Any = type(trained.model)
    settings = trained.config.model
    with torch_says_nothing():
        model, report = kind.from_pretrained(
            folder, dtype="auto", trust_remote_code=settings.trust_remote_code, output_loading_info=True
        )
    refuse_faults(report, "what was exported", kind, "give --format onnx or --format torch-export")
    model.eval()

    def compute(inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        given = {key: value.to(model.dtype) if value.is_floating_point() else value for key, value in inputs.items()}
        logits: torch.Tensor = model(**given, **call.constants).logits
        return logits.float()

    return compute
