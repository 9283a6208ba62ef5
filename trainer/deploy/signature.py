"""What an exported folder says of itself, deployment.json: by it other programs feed the model. Imports no torch."""

from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from sharding.ranks.errors import UserError
from sharding.strict_model import StrictRecord
from trainer.data.rows_manifest import TextForm

DEPLOYMENT_NAME = "deployment.json"
"""File of an exported folder that describes the model."""

Format = Literal["hf", "onnx", "torch-export"]
"""What is exported: a folder of `transformers`, a graph for ONNX Runtime, or a program of ``torch.export``."""

Dtype = Literal["fp32", "bf16", "fp16"]
"""Format of weights and of what is computed with them."""

OutputKind = Literal["classes", "binary", "tags", "number", "tokens", "values"]
"""What outputs mean: logits of classes; the log odds of the second of two; logits of each token's class; a number in
standard deviations of the training labels; logits of tokens; or what a task of the user's own makes of them."""

FILES: dict[Format, str] = {"hf": "model.safetensors", "onnx": "model.onnx", "torch-export": "model.pt2"}
"""The file of the model by format; beside it there may be more of it, where it is large."""

BATCH, LENGTH = "batch", "length"
"""Names of the axes whose sizes are not fixed: samples, and tokens of a text."""


class TensorSpec(StrictRecord):
    """An input or an output."""

    name: str
    """Its name."""

    dtype: Literal["float32", "float16", "bfloat16", "int64", "bool"]
    """What its elements are."""

    shape: list[int | str]
    """Size of each axis, or the axis' name where it has any."""


class Quality(StrictRecord):
    """The exported model beside the trained one, or a quantised one beside the export that it was made of.

    Both compute the same samples, each in its own runtime.
    """

    split: Literal["validation", "test", "train", "other", "generated"]
    """Where samples came from: a split of the run, or `other` samples, such as files that were named; `generated` where
    the run's own were not there, and drawn numbers took their place."""

    num_samples: int
    """Samples."""

    max_abs_error: float | None
    """Largest difference between two logits; None where one of both alone is not finite."""

    metric: str | None
    """Name of the metric by which the exported model is judged; None of drawn samples, which have no right answers."""

    trained: dict[str, float | None]
    """Metrics of the trained model, or of the export that a quantised one was made of; None stands for what is not
    finite."""

    exported: dict[str, float | None]
    """Metrics of the exported one."""

    @property
    def where(self) -> str:
        """What samples are, in words."""
        named = {
            "generated": "drawn samples, for the run's own were not there",
            "other": "samples of none of its splits",
        }
        return named.get(self.split, f"samples of the split {self.split}")

    def in_words(self) -> str:
        """What was found, as a sentence without its stop."""
        error = "are not finite in one of both" if self.max_abs_error is None else f"differ by {self.max_abs_error:.3g}"
        found = f"beside the trained model, on {self.num_samples:,} {self.where}: logits {error} at most"
        if self.metric is None:
            return found
        before, after = (
            "not finite" if values[self.metric] is None else f"{values[self.metric]:.6g}"
            for values in (self.trained, self.exported)
        )
        return f"{found}, {self.metric} is {after}, and {before} of the trained"


class RunRecord(StrictRecord):
    """Where a model comes from."""

    name: str
    """Name of the run."""

    step: int
    """Step of the checkpoint."""

    averaged: bool
    """Whether it is the moving average of the weights."""

    data_fingerprint: str
    """Identity of the data that it was trained on."""

    revision: str | None
    """Revision of Shardline that trained it; None where the run's folder does not say."""

    version: str | None
    """Version of Shardline that exported it."""


class Deployment(StrictRecord):
    """An exported model."""

    version: Literal[1] = 1
    """Version of this description."""

    format: Format
    """What it is."""

    file: str = Field(pattern=r"^\w[\w.-]*$")
    """Name of its file, which lies in the folder."""

    task: str
    """The run's `task.name`."""

    output_kind: OutputKind
    """What outputs mean."""

    classes: list[str]
    """Names of classes or tags in the order of outputs; of two under `binary`, the second is the one that is judged."""

    inputs: list[TensorSpec]
    """In the graph's order."""

    outputs: list[TensorSpec]
    """In the graph's order."""

    max_length: int | None
    """The most tokens of a text; None where nothing limits them, or samples are no texts."""

    normalize: TextForm | None = None
    """Unicode form of the texts that it was trained on; None where samples are no texts, or made by own code."""

    dtype: Dtype
    """Format of the weights."""

    quantization: str | None = None
    """The method, where weights were quantised."""

    quality: Quality | None
    """How it compares to the trained model; None where that was not looked at, as its card says."""

    run: RunRecord
    """Where it comes from."""


def write_deployment(deployment: Deployment, folder: Path) -> None:
    """Write the description into an exported folder."""
    (folder / DEPLOYMENT_NAME).write_text(deployment.model_dump_json(indent=2) + "\n")


def read_deployment(folder: Path) -> Deployment:
    """What an exported folder says of itself.

    Raises:
        UserError: it says nothing, or nothing that this release understands; or the model's file is not there.
    """
    try:
        deployment = Deployment.model_validate_json((folder / DEPLOYMENT_NAME).read_bytes())
    except OSError:
        raise UserError(
            f"{folder} has no {DEPLOYMENT_NAME}, so it is no folder that shardline export has written; export the run "
            "once more."
        ) from None
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise UserError(
            f"{folder / DEPLOYMENT_NAME} cannot be read ({place}: {first['msg']}); export the run once more."
        ) from None
    if not (folder / deployment.file).exists() and not (folder / f"{deployment.file}.index.json").exists():
        raise UserError(f"{folder} has no {deployment.file}, which holds its model; export the run once more.")
    return deployment
