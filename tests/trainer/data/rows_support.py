"""Rows in files, for tests, and what is prepared of them."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trainer.config import parse_config
from trainer.config.data import TEXT_SOURCES, DataConfig
from trainer.data.any_samples import prepared_samples
from trainer.data.prepare import prepare_samples
from trainer.data.prepared_rows import PreparedRows
from trainer.data.row_samples import RowSamples

Columns = dict[str, list[Any]]


def row_config(root: Path, task: str = "classification", **data: Any) -> DataConfig:
    size = {"vocab_size": 300} if data.get("source") in TEXT_SOURCES else {}
    data = {"cache_dir": str(root / "cache"), "validation_fraction": 0.2, **size, **data}
    if "validation_paths" in data:
        del data["validation_fraction"]
    values = {"steps": 1, "task": {"name": task}, "model": {"architecture": "bert"}, "data": data}
    return parse_config(values, "test", has_rules=True).data


def row_samples(root: Path, task: str = "classification", **data: Any) -> RowSamples:
    config = row_config(root, task, **data)
    samples = prepared_samples(prepare_samples(config, progress=False), config)
    assert isinstance(samples, RowSamples)
    return samples


def read_split(samples: RowSamples, split: str) -> dict[str, torch.Tensor]:
    return samples.read(split, range(samples.num_samples(split)))


def write_texts(path: Path, texts: list[tuple[str, str]], **columns: list[str]) -> Path:
    rows = [{"text": text, "label": label} for text, label in texts]
    for name, values in columns.items():
        for row, value in zip(rows, values, strict=True):
            row[name] = value
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_csv(path: Path, columns: Columns) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
    return path


def manifest_of(root: Path, task: str = "classification", **data: Any) -> Any:
    prepared = prepare_samples(row_config(root, task, **data), progress=False)
    assert isinstance(prepared, PreparedRows)
    return prepared.manifest


def ratings(num_rows: int = 60) -> Columns:
    numbers = np.random.default_rng(0).normal(3.0, 2.0, num_rows)
    return {
        "age": [f"{number:.4f}" for number in numbers],
        "city": [("Oslo", "Rome", "Lima")[i % 3] for i in range(num_rows)],
        "constant": ["7"] * num_rows,
        "label": [f"{number * 2 + i % 3:.3f}" for i, number in enumerate(numbers)],
    }
