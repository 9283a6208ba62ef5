"""``python -m benchmarks.serving.bare_fastapi FOLDER PORT``: the least that FastAPI needs, one row at a time."""

import sys
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel

from benchmarks.serving.digits import Digits


class Row(BaseModel):
    """An image."""

    pixels: list[float]


class Rows(BaseModel):
    """A request."""

    rows: list[Row]


def build(folder: Path) -> FastAPI:
    """The application."""
    app, model = FastAPI(), Digits(folder)

    @app.post("/predict")
    def predict(asked: Rows) -> dict[str, Any]:
        return {"predictions": model.predict([row.pixels for row in asked.rows])}

    return app


if __name__ == "__main__":
    uvicorn.run(build(Path(sys.argv[1])), port=int(sys.argv[2]), access_log=False, log_level="warning", backlog=2048)
