"""Mistakes of whoever trains on rows: one sentence, exit status 2, before ranks start where it is of the rows."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support import refused, shardline, write_config

_TEXTS = [{"text": f"{'sea wave' if n % 2 else 'land tree'} {n}", "label": "ab"[n % 2]} for n in range(24)]
_BERT = {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2}


def _rows(path: Path, rows: list[dict[str, Any]]) -> list[str]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [str(path)]


def _values(root: Path, **sections: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "name": "wrong",
        "steps": 2,
        "output_dir": str(root / "runs"),
        "task": {"name": "sequence-classification"},
        "model": {"builtin": "lstm", "arguments": {"embedding_size": 8, "hidden_size": 8}},
        "data": {
            "source": "jsonl",
            "paths": _rows(root / "texts.jsonl", _TEXTS),
            "vocab_size": 300,
            "sequence_length": 16,
            "cache_dir": str(root / "cache"),
        },
        "batch": {"global_size": 4, "micro_size": 2},
        "tracking": {"wandb": {"mode": "disabled"}},
    }
    for key, section in sections.items():
        values[key] = section if key == "model" else values.get(key, {}) | section
    return values


def _run(root: Path, values: dict[str, Any], *words: str) -> None:
    refused(shardline("run", write_config(root / "run.yaml", values), "--nproc-per-node", 2), *words)


def _no_rank_has_started(root: Path) -> bool:
    return not list((root / "runs").rglob("rank-*.log"))


def test_a_split_that_leaks(tmp_path: Path) -> None:
    _run(
        tmp_path,
        _values(tmp_path, data={"test_paths": _rows(tmp_path / "test.jsonl", _TEXTS[:3])}),
        "data.test_paths: the test split is empty (27 rows read, 3 of its rows being in another split too)",
    )
    assert _no_rank_has_started(tmp_path)


def test_a_class_that_is_absent_from_training(tmp_path: Path) -> None:
    other = _rows(tmp_path / "other.jsonl", [{"text": "a sky of stars", "label": "c"}])
    _run(
        tmp_path,
        _values(tmp_path, data={"validation_paths": other}),
        "other.jsonl#0 of the validation split is of the class c, which no training row has",
    )
    assert _no_rank_has_started(tmp_path)


def test_labels_that_are_no_numbers(tmp_path: Path) -> None:
    _run(tmp_path, _values(tmp_path, task={"name": "regression"}), "data.label=label", "'a'", "no number")
    assert _no_rank_has_started(tmp_path)


def test_an_image_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "images" / "cat").mkdir(parents=True)
    (tmp_path / "images" / "cat" / "one.png").write_bytes(b"no image")
    data = {"source": "images", "paths": [str(tmp_path / "images")], "image_size": 8, "cache_dir": str(tmp_path)}
    values = _values(tmp_path, task={"name": "image-classification"}, model={"builtin": "cnn"})
    _run(
        tmp_path, values | {"data": data}, "data.paths: ", "cat/one.png cannot be read as an image", "mend or remove it"
    )
    assert _no_rank_has_started(tmp_path)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        (
            {"evaluation": {"every_steps": 1, "patience": 1, "monitor": "f2"}},
            ["evaluation.monitor=f2 is no metric of task.name=sequence-classification, which has loss, accuracy"],
        ),
        (
            {"model": {"architecture": "mamba", "config": {"hidden_size": 8, "num_hidden_layers": 1}}},
            ["model.architecture=mamba", "no head for sequence-classification"],
        ),
        (
            {"task": {"name": "causal-lm"}, "model": {"architecture": "bert", "config": _BERT}},
            ["bert", "sees the tokens that it is to predict"],
        ),
    ],
    ids=["monitor", "head", "encoder"],
)
def test_what_task_and_model_cannot_do(tmp_path: Path, sections: dict[str, Any], words: list[str]) -> None:
    config = write_config(tmp_path / "run.yaml", _values(tmp_path, **sections))
    prepared = shardline("data", "prepare", config)
    assert prepared.returncode == 0, prepared.stderr
    # What ranks would find out, the dry run says before there are any.
    for arguments in ((), ("--dry-run",)):
        refused(shardline("run", config, "--nproc-per-node", 2, *arguments), *words)
