"""README.md of an exported folder: what the model is, what it was trained on, how good it is, how it is run."""

import json
import os
from pathlib import Path
from typing import Any

from trainer.checkpoint.reader import CheckpointReader
from trainer.config import RunConfig
from trainer.config.secrets import redact_values
from trainer.config.yaml_files import dump_yaml
from trainer.deploy.signature import Deployment, Quality
from trainer.deploy.trained_model import TrainedModel
from trainer.metrics.file import read_metrics
from trainer.run_folder.folder import RunFolder
from trainer.run_folder.provenance import provenance_file

CARD_NAME = "README.md"
_LEARNT_BY = (
    *("seed", "steps", "tokens", "task", "model", "data", "batch", "optimizer", "schedule", "precision"),
    *("prune", "distill", "stages"),
)
_LIBRARIES = {"hf": "transformers", "onnx": "onnx", "torch-export": "pytorch"}
_KINDS = {
    "classes": "a logit for each class",
    "binary": "the log odds of the second class",
    "tags": "a logit for each class, of each token",
    "number": "a number in standard deviations from the mean of the training labels, as `rows.json` has them",
    "tokens": "a logit for each token of the vocabulary, at each position",
    "values": "what the run's own task makes of it",
}


def run_folder_of(reader: CheckpointReader) -> RunFolder | None:
    """The run's folder, where its checkpoint lies in it."""
    place = reader.folder
    if not isinstance(place, Path) or not (place.parent.parent / "config.yaml").exists():
        return None
    return RunFolder(place.parent.parent)


def trained_revision(reader: CheckpointReader) -> str | None:
    """Revision of Shardline, or its version, at the run's latest attempt; None where nothing says it."""
    folder = run_folder_of(reader)
    if folder is None:
        return None
    attempt = 1
    while provenance_file(folder.path, attempt + 1).exists():
        attempt += 1
    try:
        code = json.loads(provenance_file(folder.path, attempt).read_text())["code"]
    except (OSError, ValueError, KeyError):
        return None
    revision: str | None = code.get("git_revision") or code.get("distribution_version")
    return revision


def write_card(trained: TrainedModel, deployment: Deployment, not_compared: str | None, folder: Path) -> None:
    """Write the card.

    Args:
        trained: the model that was exported.
        deployment: what became of it.
        not_compared: why it was not compared with the trained model; None where it was.
        folder: the exported folder.
    """
    run, config = deployment.run, trained.run_config
    num_parameters = sum(p.numel() for p in trained.model.parameters())
    averaged = "the moving average of the weights at " if run.averaged else ""
    sections = [
        f"---\nlibrary_name: {_LIBRARIES[deployment.format]}\ntags:\n- shardline\n- {deployment.task}\n---",
        f"# {run.name}",
        f"{type(trained.model).__name__} with {num_parameters:,} parameters, trained for {deployment.task}: "
        f"{averaged}step {run.step:,} of the run {run.name}, as `{deployment.file}` ({deployment.format}, "
        f"{deployment.dtype}{', ' + deployment.quantization if deployment.quantization else ''}).",
        _interface(deployment),
        f"## Data\n\n{_data(config)}\n\nFingerprint: `{run.data_fingerprint}`.",
        f"## Metrics\n\n{_metrics(trained, deployment.quality, not_compared)}",
        f"## Configuration\n\nWhat differs from Shardline's defaults:\n\n```yaml\n{_configuration(config)}```",
        f"## Revision\n\nTrained by Shardline {run.revision or 'of an unknown revision'}, exported by version "
        f"{run.version or 'of a folder that is not installed'}.",
    ]
    (folder / CARD_NAME).write_text("\n\n".join(sections) + "\n")


def _interface(deployment: Deployment) -> str:
    rows = [
        f"| {kind} | `{spec.name}` | {spec.dtype} | {' x '.join(map(str, spec.shape))} |"
        for kind, specs in (("input", deployment.inputs), ("output", deployment.outputs))
        for spec in specs
    ]
    lines = ["## Inputs and outputs", "", "| | name | type | shape |", "| --- | --- | --- | --- |", *rows, ""]
    lines.append(f"The output is {_KINDS[deployment.output_kind]}.")
    if deployment.classes:
        lines[-1] += f" Classes: {', '.join(deployment.classes)}."
    if deployment.max_length is not None:
        lines[-1] += f" A text has at most {deployment.max_length:,} tokens."
    if deployment.output_kind == "tokens" and deployment.format != "hf":
        lines[-1] += " There is no cache of keys and values: it scores texts, and is slow at continuing them."
    lines += ["", "```python", *_USE[deployment.format], "```"]
    return "\n".join(lines).replace("FILE", deployment.file).replace("NAME", deployment.inputs[0].name)


_USE = {
    "hf": [
        "import json, transformers",
        "",
        'name = json.load(open("config.json"))["architectures"][0]',
        'model = getattr(transformers, name).from_pretrained(".", dtype="auto")',
    ],
    "onnx": [
        "import onnxruntime",
        "",
        'session = onnxruntime.InferenceSession("FILE")',
        '[logits] = session.run(["logits"], {"NAME": ...})',
    ],
    "torch-export": [
        "import torch",
        "",
        'model = torch.export.load("FILE").module()',
        "logits = model(NAME=...)",
    ],
}


def _data(config: RunConfig) -> str:
    data = config.data
    sources = [source.name for source in data.mixture] if data.mixture else [data.source]
    named = [data.hub_name] if data.hub_name else [Path(path).name for path in data.paths]
    return f"Source: {', '.join(sources)}{' (' + ', '.join(map(str, named)) + ')' if named else ''}."


def _metrics(trained: TrainedModel, quality: Quality | None, not_compared: str | None) -> str:
    lines: list[str] = []
    reader, averaged = trained.reader, trained.averaged
    folder, step = run_folder_of(reader), reader.manifest.training.step
    logged = [] if folder is None else [line for line in read_metrics(folder.metrics_file) if line.get("step") == step]
    of_step = {key: value for line in logged for key, value in line.items() if key.startswith("eval/")}
    # Of the weights that are meant.
    of_step = {key: value for key, value in of_step.items() if ("ema_" in key) == averaged}
    if of_step:
        lines += [f"The run's own evaluation at step {step:,}:", "", "| metric | value |", "| --- | --- |"]
        lines += [f"| {name.removeprefix('eval/')} | {_shown(value)} |" for name, value in of_step.items()]
        lines.append("")
    if quality is None:
        return "\n".join([*lines, f"This export was not compared with the trained model: {not_compared}"])
    lines.append(f"This export in its own runtime, {quality.in_words()}.")
    if quality.split != "generated":
        lines += ["", "| metric | trained | this export |", "| --- | --- | --- |"]
        lines += [
            f"| {name} | {_shown(value)} | {_shown(quality.exported.get(name))} |"
            for name, value in quality.trained.items()
        ]
    return "\n".join(lines)


def _configuration(config: RunConfig) -> str:
    changed: dict[str, Any] = config.model_dump(mode="json", exclude_defaults=True, by_alias=True)
    learnt_by = {key: changed[key] for key in _LEARNT_BY if key in changed}
    learnt_by.get("data", {}).pop("cache_dir", None)
    return dump_yaml(_without_places(redact_values(learnt_by, os.environ)))


def _without_places(value: Any) -> Any:
    """Settings with the names of files and folders alone, for where they lie on a machine is nobody else's matter."""
    if isinstance(value, dict):
        return {key: _without_places(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_places(inner) for inner in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def _shown(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.6g}"
