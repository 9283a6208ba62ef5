"""The model that all serve, fed as a peer would feed it: ONNX Runtime and numpy, with nothing of Shardline."""

import json
from pathlib import Path
from typing import Any

import numpy as np


class Digits:
    """An exported classifier of digits."""

    def __init__(self, folder: Path) -> None:
        """Load it, with one thread, as ``shardline serve`` does."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = onnxruntime.InferenceSession(
            str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"]
        )
        self._input = self._session.get_inputs()[0].name
        recipe = json.loads((folder / "rows.json").read_text())
        self.shape = tuple(recipe["image_shape"])
        self.max_pixel = recipe["max_pixel"]
        self._classes = recipe["classes"]
        self._mean, self._scale = recipe["means"][0], recipe["scales"][0]

    def predict(self, rows: list[list[float]]) -> list[dict[str, Any]]:
        """Class and probabilities of rows of pixels."""
        pixels = np.array(rows, dtype=np.float64).reshape(-1, *self.shape)
        batch = ((pixels - self._mean) / self._scale).astype(np.float32)
        logits = self._session.run(None, {self._input: batch})[0].astype(np.float64)
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        probabilities = weights / weights.sum(axis=1, keepdims=True)
        return [
            {
                "class": self._classes[int(row.argmax())],
                "probabilities": dict(zip(self._classes, row.tolist(), strict=True)),
            }
            for row in probabilities
        ]
