"""Exported folders with small graphs of known weights, and servers of them."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.support import ROOT, command_environment, wait_until
from trainer.commands.serve import main
from trainer.data.rows_manifest import RECIPE_NAME, CategoryColumn, RowRecipe
from trainer.deploy.signature import Deployment, OutputKind, RunRecord, TensorSpec, write_deployment

DIGITS = RowRecipe(
    kind="image",
    label_kind="class",
    classes=[str(digit) for digit in range(10)],
    image_shape=(1, 8, 8),
    max_pixel=16,
    means=[4.9],
    scales=[6.0],
)
TABLE = RowRecipe(
    kind="table",
    label_kind="number",
    label_mean=100.0,
    label_scale=25.0,
    features=["age", "body mass"],
    categories=[CategoryColumn(name="city", values=["Lima", "Oslo"])],
    fills=[40.0, 20.0],
    means=[40.0, 20.0],
    scales=[10.0, 1e-3],
    missing="mean",
)


def weights_of(*shape: int, seed: int = 0) -> np.ndarray:
    """Weights, fp32."""
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def write_folder(
    folder: Path,
    recipe: RowRecipe | None,
    output_kind: OutputKind,
    inputs: dict[str, list[int | str]],
    nodes: list[Any],
    weights: dict[str, np.ndarray],
    *,
    outputs: list[int | str],
    **settings: Any,
) -> Path:
    """An exported folder whose model has these nodes."""
    folder.mkdir(parents=True)
    is_whole = {"input_ids", "attention_mask", "categories"}
    values = [
        helper.make_tensor_value_info(name, TensorProto.INT64 if name in is_whole else TensorProto.FLOAT, shape)
        for name, shape in inputs.items()
    ]
    made = helper.make_graph(
        nodes,
        "tiny",
        values,
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, outputs)],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    onnx.checker.check_model(model)
    onnx.save(model, folder / "model.onnx")
    if recipe is not None:
        (folder / RECIPE_NAME).write_text(recipe.model_dump_json())
    run = RunRecord(name="tiny", step=6, averaged=False, data_fingerprint="0", revision=None, version="0.1.0")
    described: dict[str, Any] = {
        "format": "onnx",
        "file": "model.onnx",
        "task": "masked-lm" if output_kind == "tokens" else "classification",
        "output_kind": output_kind,
        "classes": recipe.classes if recipe is not None else [],
        "inputs": [
            TensorSpec(name=name, dtype="int64" if name in is_whole else "float32", shape=shape)
            for name, shape in inputs.items()
        ],
        "outputs": [TensorSpec(name="logits", dtype="float32", shape=outputs)],
        "max_length": None,
        "dtype": "fp32",
        "quality": None,
        "run": run,
    }
    write_deployment(Deployment(**described | settings), folder)
    return folder


def digits_folder(folder: Path) -> Path:
    """Classes of digits by one layer."""
    nodes = [
        helper.make_node("Flatten", ["pixel_values"], ["flat"]),
        helper.make_node("Gemm", ["flat", "w", "b"], ["logits"]),
    ]
    weights = {"w": weights_of(64, 10), "b": weights_of(10, seed=1)}
    inputs: dict[str, list[int | str]] = {"pixel_values": ["batch", 1, 8, 8]}
    return write_folder(folder, DIGITS, "classes", inputs, nodes, weights, outputs=["batch", 10])


def digits_answer(pixels: Any) -> np.ndarray:
    """Probabilities of one digit, as that layer has them."""
    flat = ((np.array(pixels, dtype=np.float64).reshape(64) - 4.9) / 6.0).astype(np.float32)
    logits = (flat @ weights_of(64, 10) + weights_of(10, seed=1)).astype(np.float64)
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def table_folder(folder: Path, recipe: RowRecipe = TABLE) -> Path:
    """A number from two features and a category."""
    nodes = [
        helper.make_node("Cast", ["categories"], ["indices"], to=TensorProto.FLOAT),
        helper.make_node("Concat", ["features", "indices"], ["joined"], axis=1),
        helper.make_node("Gemm", ["joined", "w"], ["logits"]),
    ]
    inputs: dict[str, list[int | str]] = {"features": ["batch", 2], "categories": ["batch", 1]}
    weights = {"w": np.array([[20.0], [0.0], [2.0]], dtype=np.float32)}
    return write_folder(folder, recipe, "number", inputs, nodes, weights, outputs=["batch", 1], task="regression")


class Server:
    """A server of a folder, in a process of its own."""

    def __init__(self, process: subprocess.Popen[bytes], folder: Path, log: Path) -> None:
        self.process, self.folder, self.log = process, folder, log
        self.url = ""

    def begin(self, start_s: float) -> None:
        """Wait until it says where it is."""

        def address() -> str | None:
            assert self.process.poll() is None, self.log.read_text()
            found = re.search(r"at (http://[\w.:]+)", self.log.read_text())
            return found[1] if found else None

        self.url = wait_until(address, start_s, what="the server's address")
        wait_until(self._answers, what="an answer")

    def _answers(self) -> bool:
        try:
            return httpx.get(f"{self.url}/ready").is_success
        except httpx.HTTPError:
            return False

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def ask(self, *rows: Any, **settings: Any) -> httpx.Response:
        """The answer to rows."""
        return httpx.post(f"{self.url}/predict", json={"rows": list(rows)}, timeout=30, **settings)

    def send(self, body: bytes, content_type: str = "application/json", **headers: str) -> httpx.Response:
        """The answer to a body as it is."""
        return httpx.post(
            f"{self.url}/predict", content=body, headers={"Content-Type": content_type, **headers}, timeout=30
        )


@contextmanager
def serving(folder: Path, *options: str, start_s: float = 60.0, **variables: str) -> Iterator[Server]:
    """A server from its first answer on; ended, and seen to end well, after it."""
    log = folder.parent / f"{folder.name}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "trainer.commands.serve", str(folder), "--port", "0", *options],
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=command_environment(**variables),
        )
    server = Server(process, folder, log)
    try:
        server.begin(start_s)
        yield server
        if process.poll() is None:
            process.terminate()
            assert process.wait(30) == 0, log.read_text()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def refused_by(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The sentence by which the command refuses its arguments."""
    assert main([str(argument) for argument in arguments]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    return said[0]


def detail(answer: httpx.Response) -> str:
    """Why there is no answer."""
    said = json.loads(answer.content)
    assert list(said) == ["detail"], said
    return str(said["detail"])
