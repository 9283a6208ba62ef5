"""ONNX files in a process that has onnxruntime and numpy alone, beside torch's own numbers."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.support import command_environment
from trainer.checkpoint.reader import open_checkpoint
from trainer.deploy.allowed_code import AllowedCode
from trainer.deploy.signature import Deployment, TensorSpec, read_deployment
from trainer.deploy.trained_model import check_checkpoint, open_trained

# Nothing but what a server would install can be imported.
_ALONE = """
import json, sys
absent = {"torch", "transformers", "onnx", "onnxscript", "trainer", "sharding", "shardline"}
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in absent:
            raise ImportError(name)
sys.meta_path.insert(0, Absent())
import numpy, onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
errors = {}
for name, (folder, cases) in json.load(open(sys.argv[1])).items():
    session = onnxruntime.InferenceSession(folder + "/model.onnx", options)
    errors[name] = []
    for case in cases:
        arrays = dict(numpy.load(case))
        expected = arrays.pop("expected")
        [logits] = session.run(["logits"], arrays)
        assert logits.shape == expected.shape, (name, logits.shape, expected.shape)
        errors[name].append(float(abs(logits - expected).max()))
assert not absent & set(sys.modules)
print(json.dumps(errors))
"""

Sizes = list[tuple[int, int]]
"""Batch and length."""


def max_errors_elsewhere(exports: dict[str, tuple[Path, Path]], sizes: Sizes) -> dict[str, list[float]]:
    """Largest difference of two logits for each size.

    Args:
        exports: run and exported folder by name.
        sizes: batches and lengths to compute with; where samples are no texts the length says nothing.
    """
    with tempfile.TemporaryDirectory() as work:
        jobs = {
            name: (str(folder), _write_cases(run, read_deployment(folder), sizes, Path(work) / name))
            for name, (run, folder) in exports.items()
        }
        (Path(work) / "jobs.json").write_text(json.dumps(jobs))
        finished = subprocess.run(
            [sys.executable, "-c", _ALONE, str(Path(work) / "jobs.json")],
            capture_output=True,
            text=True,
            timeout=250,
            cwd=work,
            env=command_environment(),
            check=False,
        )
        assert finished.returncode == 0, finished.stderr[-2000:]
        errors: dict[str, list[float]] = json.loads(finished.stdout)
        return errors


def trained_logits(run: Path, work: Path, allowed: AllowedCode | None = None) -> Any:
    """What computes a run's logits of inputs by name, in torch."""
    allowed = allowed or AllowedCode()
    reader = open_checkpoint(str(run), None)
    work.mkdir()
    trained = open_trained(reader, check_checkpoint(reader, averaged=False, allowed=allowed), work, averaged=False)
    model = trained.materialized()
    without_cache = {"use_cache": False} if trained.config.task.name == "causal-lm" else {}

    def compute(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        with torch.no_grad():
            made = model(**inputs, **without_cache)
        logits: torch.Tensor = getattr(made, "logits", made)
        return logits

    return compute


def drawn_inputs(deployment: Deployment, num_rows: int, length: int) -> dict[str, torch.Tensor]:
    """Inputs of a size; a mask hides the ends of all texts but the first."""
    draw = torch.Generator().manual_seed(1000 * num_rows + length)

    def drawn(spec: TensorSpec) -> torch.Tensor:
        shape = [{"batch": num_rows, "length": length}.get(size, size) for size in spec.shape]
        if spec.dtype == "float32":
            return torch.randn(shape, generator=draw)
        if spec.name == "attention_mask":
            lengths = torch.randint(1, length + 1, (num_rows, 1), generator=draw)
            lengths[0] = length
            return (torch.arange(length) < lengths).long()
        return torch.randint(5, shape, generator=draw)

    return {spec.name: drawn(spec) for spec in deployment.inputs}


def _write_cases(run: Path, deployment: Deployment, sizes: Sizes, folder: Path) -> list[str]:
    compute = trained_logits(run, folder)
    files = []
    for num_rows, length in sizes:
        inputs = drawn_inputs(deployment, num_rows, length)
        arrays = {name: value.numpy() for name, value in inputs.items()}
        files.append(str(folder / f"{num_rows}-{length}.npz"))
        np.savez(files[-1], expected=compute(inputs).numpy(), **arrays)
    return files
