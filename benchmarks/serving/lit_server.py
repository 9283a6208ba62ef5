"""``python -m benchmarks.serving.lit_server FOLDER PORT``: LitServe with the batches that ``shardline serve`` has."""

import sys
from pathlib import Path
from typing import Any

import litserve

from benchmarks.serving.digits import Digits

MAX_BATCH, MAX_WAIT_S = 32, 0.002


class DigitsApi(litserve.LitAPI):
    """The model behind LitServe; a request has one row here."""

    def setup(self, device: str) -> None:
        """See LitServe."""
        self.model = Digits(Path(sys.argv[1]))

    def decode_request(self, request: dict[str, Any]) -> list[float]:
        """See LitServe."""
        pixels: list[float] = request["rows"][0]["pixels"]
        return pixels

    def batch(self, inputs: list[list[float]]) -> list[list[float]]:
        """See LitServe."""
        return inputs

    def predict(self, rows: list[list[float]]) -> list[dict[str, Any]]:
        """See LitServe."""
        return self.model.predict(rows)

    def unbatch(self, output: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """See LitServe."""
        return output

    def encode_response(self, output: dict[str, Any]) -> dict[str, Any]:
        """See LitServe."""
        return {"predictions": [output]}


if __name__ == "__main__":
    api = DigitsApi(max_batch_size=MAX_BATCH, batch_timeout=MAX_WAIT_S)
    server = litserve.LitServer(api, accelerator="cpu", devices=1, workers_per_device=1, timeout=60)
    server.run(
        host="127.0.0.1", port=int(sys.argv[2]), generate_client_file=False, log_level="warning", num_api_servers=1
    )
