"""An exported model in ONNX Runtime, from rows of requests to predictions."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel

from sharding.ranks.errors import UserError
from trainer.data.row_arrays import StoredRow
from trainer.data.rows_manifest import RECIPE_NAME, RowRecipe, read_recipe
from trainer.deploy.signature import Deployment, read_deployment
from trainer.serving.masks import MaskReader
from trainer.serving.options import RequestFault
from trainer.serving.predictions import Predictor, largest_rows
from trainer.serving.reading import Arrays, RowReader, recipe_reader
from trainer.serving.row_forms import kind_of, row_form

_MAX_OUTPUT_BYTES = 256 * 2**20
_NUMPY_DTYPES = {"float32": np.float32, "float16": np.float16, "int64": np.int64, "bool": np.bool_}
_EXAMPLE_TOKENS = 7


@dataclass(frozen=True)
class Asked:
    """Rows of one request.

    Attributes:
        rows: in their form, checked.
        top_k: candidates of each mask.
    """

    rows: Sequence[Any]
    top_k: int = 5


Answer = list[dict[str, Any]]
"""A prediction for each row."""


class ServedModel:
    """A model that answers; its methods are called by one thread at a time."""

    def __init__(self, folder: Path, num_threads: int) -> None:
        """Open an exported folder.

        Args:
            folder: as ``shardline export --format onnx`` writes it.
            num_threads: threads that compute one batch.

        Raises:
            UserError: it is none, a part of it is missing or broken, or onnxruntime is not installed.
        """
        self.deployment = read_deployment(folder)
        _refuse_format(self.deployment, folder)
        self.recipe = _read_recipe(folder, self.deployment)
        self._session = _open_session(folder / self.deployment.file, num_threads)
        self._input_dtypes = {spec.name: _NUMPY_DTYPES.get(spec.dtype) for spec in self.deployment.inputs}
        self._masks: MaskReader | None = None
        self._reader: RowReader
        if self.recipe is not None:
            self._reader = recipe_reader(self.recipe, folder)
            self._predict = Predictor(self.deployment, self.recipe)
        else:
            self._reader = self._masks = MaskReader(folder, self.deployment.max_length, self.deployment.normalize)
        self.kind = kind_of(self.recipe)
        self.row_form: type[BaseModel] = row_form(self.recipe)
        self.mask = None if self._masks is None else self._masks.mask

    def warm_up(self) -> None:
        """Compute once, so that the first request waits for nothing, and a folder whose parts do not fit is found out.

        Raises:
            UserError: they do not fit together.
        """
        try:
            logits = np.stack(
                [of_row[..., -1, :] if of_row.ndim > 1 else of_row for of_row in self._logits(self._examples())]
            )
        except Exception as error:  # noqa: BLE001 - of numpy or of the runtime, by what does not fit
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"the model of {self.deployment.run.name} does not compute on its own rows ({reason}); export the run "
                "once more."
            ) from None
        classes = len(self.deployment.classes)
        if self.deployment.output_kind == "classes" and logits.shape[-1] != classes:
            raise UserError(
                f"the model of {self.deployment.run.name} has {logits.shape[-1]} outputs and {classes} classes; export "
                "the run once more."
            )

    def answers(self, requests: Sequence[Asked]) -> list[Answer | RequestFault]:
        """Predictions for the rows of several requests, which are computed together; a fault is its request's alone."""
        outcomes: list[Answer | RequestFault] = []
        stored: list[list[StoredRow]] = []
        for request in requests:
            try:
                rows = self._reader.store(request.rows)
                self._refuse_infinite(rows)
                stored.append(rows)
                outcomes.append([])
            except RequestFault as fault:
                stored.append([])
                outcomes.append(fault)
        logits = self._logits([row for rows in stored for row in rows])
        for index, (request, rows) in enumerate(zip(requests, stored, strict=True)):
            of_request, logits = logits[: len(rows)], logits[len(rows) :]
            if rows:
                try:
                    outcomes[index] = self._predictions(request, rows, of_request)
                except RequestFault as fault:
                    outcomes[index] = fault
        return outcomes

    def _predictions(self, request: Asked, rows: list[StoredRow], logits: list[np.ndarray]) -> Answer:
        answer = []
        for index, (row, stored, of_row) in enumerate(zip(request.rows, rows, logits, strict=True)):
            if not np.isfinite(of_row).all():
                raise RequestFault(422, f"row {index}: its values are so large that the model's answer is no number")
            if self._masks is not None:
                answer.append(self._masks.prediction(stored, of_row, request.top_k))
            else:
                answer.append(self._predict(row, stored, of_row))
        return answer

    def _refuse_infinite(self, rows: list[StoredRow]) -> None:
        """Assert that normalised numbers are finite in fp32, which those of a table need not be."""
        if self.kind == "table" and self.recipe is not None and self.recipe.features:
            for index, row in enumerate(rows):
                with np.errstate(over="ignore"):
                    features = self._reader.arrays([row])["features"][0]
                if not np.isfinite(features).all():
                    name = self.recipe.features[int(np.argmin(np.isfinite(features)))]
                    raise RequestFault(
                        422, f"row {index}: {name} is so far from what was trained on that it has no fp32"
                    )

    def _logits(self, rows: list[StoredRow]) -> list[np.ndarray]:
        """Of each row, of a text those of its own tokens."""
        is_by_token = self.deployment.output_kind in ("tokens", "tags")
        lengths = [len(row.get("input_ids", ())) for row in rows]
        at_once = largest_rows(lengths, self._num_outputs(), _MAX_OUTPUT_BYTES) if is_by_token else len(rows)
        found: list[np.ndarray | None] = [None] * len(rows)
        for group in self._groups(lengths):
            for start in range(0, len(group), at_once):
                chosen = group[start : start + at_once]
                for index, logits in zip(
                    chosen, self._run(self._reader.arrays([rows[i] for i in chosen])), strict=True
                ):
                    found[index] = logits[: lengths[index]] if is_by_token else logits
        return [logits for logits in found if logits is not None]

    def _groups(self, lengths: list[int]) -> list[list[int]]:
        """Rows that may be computed together; a model of texts that is told of no padding gets none."""
        if "attention_mask" in self._input_dtypes or "input_ids" not in self._input_dtypes:
            return [list(range(len(lengths)))] if lengths else []
        groups: dict[int, list[int]] = {}
        for index, length in enumerate(lengths):
            groups.setdefault(length, []).append(index)
        return list(groups.values())

    def _num_outputs(self) -> int:
        size = self.deployment.outputs[0].shape[-1]
        return size if isinstance(size, int) else 1

    def _run(self, arrays: Arrays) -> np.ndarray:
        feeds = {name: arrays[name].astype(dtype, copy=False) for name, dtype in self._input_dtypes.items()}
        logits: np.ndarray = self._session.run([self.deployment.outputs[0].name], feeds)[0]
        return logits

    def _examples(self) -> list[StoredRow]:
        """Some rows, texts of several lengths: a graph may have been made for one alone."""
        recipe = self.recipe
        if recipe is None or recipe.kind == "text":
            longest = min(_EXAMPLE_TOKENS, (recipe and recipe.sequence_length) or self.deployment.max_length or 1)
            return [{"input_ids": np.zeros(length, dtype=np.int64)} for length in (longest, 1)]
        row: dict[str, np.ndarray] = {
            "features": np.array(recipe.fills, dtype=np.float64),
            "categories": np.zeros(len(recipe.categories), dtype=np.int32),
            "pixels": np.zeros(int(np.prod(recipe.image_shape or (0,))), dtype=np.uint8),
            "sound": np.zeros(1, dtype=np.float32),
        }
        return [row] * 3


def _refuse_format(deployment: Deployment, folder: Path) -> None:
    if deployment.format != "onnx":
        raise UserError(
            f"{folder} holds a model of format {deployment.format}, and ONNX Runtime answers for {deployment.task}; "
            "export the run with --format onnx, or serve the run itself."
        )
    if deployment.output_kind == "tokens" and deployment.task != "masked-lm":
        raise UserError(
            f"{folder} holds a language model in ONNX, which scores texts and keeps no cache to write them by; export "
            "the run with --format hf, or serve the run itself."
        )
    if len(deployment.outputs) != 1:
        raise UserError(f"{folder} holds a model with {len(deployment.outputs)} outputs, and one is served.")
    unread = [spec.name for spec in deployment.inputs if spec.dtype not in _NUMPY_DTYPES]
    if unread:
        raise UserError(
            f"{folder} holds a model whose input {unread[0]} is bfloat16, which numpy lacks; export with --dtype fp16."
        )


def _read_recipe(folder: Path, deployment: Deployment) -> RowRecipe | None:
    file = folder / RECIPE_NAME
    if not file.exists():
        if deployment.output_kind == "tokens":
            return None
        raise UserError(f"{folder} has no {RECIPE_NAME}, which says how rows are read; export the run once more.")
    return read_recipe(file)


def _open_session(file: Path, num_threads: int) -> Any:
    try:
        import onnxruntime
    except ImportError:
        raise UserError(
            "shardline serve needs onnxruntime, which is not installed; install it with pip install 'shardline[serve]'."
        ) from None
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = num_threads
    settings.inter_op_num_threads = 1
    # Threads that spin between two batches would take the processor from those that read requests.
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    settings.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(file), settings, providers=["CPUExecutionProvider"])
    except Exception as error:  # noqa: BLE001 - the runtime raises kinds of its own, by what is broken
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{file} cannot be loaded by onnxruntime ({reason}); export the run once more.") from None
