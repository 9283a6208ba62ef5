"""Two exported models on the same samples, each in its own runtime: metrics, logits, and times."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import nn

from trainer.deploy.exported_model import open_onnx
from trainer.deploy.held_out import HeldOut
from trainer.deploy.model_call import Compute, ModelCall, answered_by
from trainer.deploy.quantization_result import Speed
from trainer.deploy.quantized_folder import load_folder
from trainer.deploy.signature import Deployment
from trainer.deploy.verify_export import Comparison, Scores, max_difference
from trainer.metrics.paired_times import ratio_of_medians, time_in_turns
from trainer.tasks.task import Task

_NUM_PAIRS = 300
_LIMIT_S = 10.0
_BATCH_SIZES = (1, 32)


@dataclass(frozen=True, eq=False)
class Reference:
    """What exported models are compared by.

    Attributes:
        task: of the model; it has built ``model``, and so knows how it is fed.
        task_name: the run's ``task.name``.
        model: of the class that was exported; its weights are not looked at.
        held_out: samples that it was not trained on.
        source: where these are from, in words.
        monitor: the metric that the run is judged by, ``evaluation.monitor``.
        run: the run or folder that says how samples are read.
        data_fingerprint: of the data that the run was trained on; None where samples are no split of it.
    """

    task: Task
    task_name: str
    model: nn.Module
    held_out: HeldOut
    source: str
    monitor: str
    run: str
    data_fingerprint: str | None


def open_folder(folder: Path, deployment: Deployment | None) -> Compute:
    """An exported model as whoever uses it runs it: ONNX on the processor, others on a GPU if there is one.

    Args:
        folder: the exported one.
        deployment: what it says of itself; None for one of transformers that says nothing.

    Raises:
        UserError: it is not whole, or what runs it is not installed or has no kernel for it.
    """
    if deployment is not None and deployment.format == "onnx":
        return open_onnx(folder, deployment)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_folder(folder).to(device)
    constants = {"use_cache": False} if hasattr(model.config, "use_cache") else {}

    def compute(inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        given = {
            name: value.to(device, model.dtype if value.is_floating_point() else value.dtype)
            for name, value in inputs.items()
        }
        with torch.no_grad():
            logits: torch.Tensor = model(**given, **constants).logits
        return logits.float().cpu()

    return compute


def compare_folders(before: Compute, after: Compute, reference: Reference) -> Comparison:
    """Run both models on all samples, and on one sample alone."""
    task, model = reference.task, reference.model
    of_before, of_after = Scores(task), Scores(task)
    errors: list[float] = []
    # Reading draws too, and a caller's own draws go on as if nothing had been compared.
    with torch.random.fork_rng(devices=[]):
        for batch in reference.held_out.batches():
            call = _call(reference, batch)
            if not errors:
                alone = {name: value[:1] for name, value in call.inputs.items()}
                errors.append(max_difference(before(alone), after(alone)))
            with answered_by(before, model, call):
                first = of_before.add(model, batch)
            with answered_by(after, model, call):
                errors.append(max_difference(first, of_after.add(model, batch)))
    return Comparison(max(errors), of_before.metrics(), of_after.metrics())


def speeds(before: Compute, after: Compute, reference: Reference) -> tuple[Speed, ...]:
    """Times of the first samples, as one batch and as a larger one."""
    inputs = _call(reference, next(reference.held_out.batches())).inputs
    num_rows, measured = min(map(len, inputs.values())), []
    for size in sorted({min(size, num_rows) for size in _BATCH_SIZES}):
        rows = {name: tensor[:size].contiguous() for name, tensor in inputs.items()}
        first, second = time_in_turns(
            partial(before, rows), partial(after, rows), num_pairs=_NUM_PAIRS, limit_s=_LIMIT_S
        )
        measured.append(Speed(size, median(first), median(second), ratio_of_medians(second, first), len(first)))
    return tuple(measured)


def _call(reference: Reference, batch: dict[str, torch.Tensor]) -> ModelCall:
    from transformers import PreTrainedModel

    inputs = reference.task.inputs(batch)
    return ModelCall(inputs, {}, torch.empty(0), gives_tensor=not isinstance(reference.model, PreTrainedModel))
