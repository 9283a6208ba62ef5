"""Each task beside one plain process: texts, tokens, images, recordings, tables, on models of every kind."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trainer.config import parse_config
from trainer.parity.cases import ParityCase
from trainer.parity.comparison import run_parity

_SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_BERT = {"architecture": "bert", "config": _SIZES}
_WAV2VEC2 = {
    "conv_dim": [8, 8],
    "conv_stride": [5, 4],
    "conv_kernel": [10, 5],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
}
_WORDS = ["import", "return", "class", "while", "except", "lambda", "yield"]


def _lines(path: Path, lines: list[dict[str, Any]]) -> list[str]:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return [str(path)]


def _texts(folder: Path) -> dict[str, Any]:
    lines = [{"text": " ".join(_WORDS[i % 5 : i % 5 + 1 + i % 3]), "label": _WORDS[i % 3]} for i in range(60)]
    return {"source": "jsonl", "paths": _lines(folder / "texts.jsonl", lines), "vocab_size": 300, "sequence_length": 32}


def _tags(folder: Path) -> dict[str, Any]:
    lines = [
        {"text": (words := _WORDS[i % 4 : i % 4 + 2 + i % 3]), "label": [word[0] for word in words]} for i in range(60)
    ]
    return {"source": "jsonl", "paths": _lines(folder / "tags.jsonl", lines), "vocab_size": 300, "sequence_length": 48}


def _ratings(folder: Path) -> dict[str, Any]:
    rows = ["user,item,hour,label"] + [f"u{i % 7},i{i % 5},{i % 24},{1 + (i * 3) % 5}" for i in range(60)]
    (folder / "ratings.csv").write_text("\n".join(rows) + "\n")
    return {"source": "table", "paths": [str(folder / "ratings.csv")]}


def _recordings(folder: Path) -> dict[str, Any]:
    import soundfile

    for number in range(40):
        place = folder / "sounds" / ("low" if number % 2 else "high")
        place.mkdir(parents=True, exist_ok=True)
        times = np.arange(600 + 10 * number) / 8000
        soundfile.write(place / f"{number}.wav", 0.5 * np.sin(2 * np.pi * (200 if number % 2 else 900) * times), 8000)
    return {"source": "audio", "paths": [str(folder / "sounds")]}


_CASES: dict[str, tuple[str, dict[str, Any], Any]] = {
    "texts": ("sequence-classification", _BERT, _texts),
    "texts by a decoder": ("sequence-classification", {"architecture": "llama", "config": _SIZES}, _texts),
    "tokens": ("token-classification", {"architecture": "modernbert", "config": _SIZES}, _tags),
    "images": (
        "image-classification",
        {"architecture": "vit", "config": _SIZES | {"patch_size": 4}},
        lambda _: {"source": "digits"},
    ),
    "recordings": ("audio-classification", {"architecture": "wav2vec2", "config": _SIZES | _WAV2VEC2}, _recordings),
    "a table": (
        "classification",
        {"builtin": "mlp", "arguments": {"activation": "gelu"}},
        lambda _: {"source": "table", "table": "iris"},
    ),
    "ratings": ("regression", {"builtin": "embedding-mlp", "arguments": {"embedding_size": 4}}, _ratings),
}

# Whose mechanism another case has, too.
_SLOW = ("texts by a decoder", "a table")


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", [name for name in _CASES if name not in _SLOW])
def test_each_task_trains_as_one_process(name: str, tmp_path: Path) -> None:
    _check_case(name, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", _SLOW)
def test_further_models_do_so_too(name: str, tmp_path: Path) -> None:
    _check_case(name, tmp_path)


def _check_case(name: str, tmp_path: Path) -> None:
    task, model, data = _CASES[name]
    cases = [ParityCase(strategy, 2, 3, "sgd") for strategy in ("ddp", "zero3")]
    cases += [ParityCase("zero3", 2, 3, "sgd", "bucketed"), ParityCase("zero2", 2, 1, "sgd", "deepspeed")]
    cases += [ParityCase("zero2", 2, 3, "sgd", compute="bf16")]
    _check(tmp_path, task, model, {"cache_dir": str(tmp_path / "cache"), **data(tmp_path)}, cases)


def test_every_task_by_name_that_reads_rows_is_tried() -> None:
    from trainer.config.rows import TASK_SAMPLES

    assert {task for task, _, _ in _CASES.values()} == {
        name for name, (kind, _) in TASK_SAMPLES.items() if kind == "rows"
    }


@pytest.mark.timeout(300)
def test_masked_language_modelling_does_so_too(tmp_path: Path, shared_corpus: tuple[Path, Path]) -> None:
    corpus, cache = shared_corpus
    data = {"source": "text", "paths": [str(corpus)], "vocab_size": 301, "sequence_length": 32, "cache_dir": str(cache)}
    cases = [ParityCase("zero3", 2, 3, "sgd"), ParityCase("zero2", 2, 3, "sgd", "bucketed")]
    _check(tmp_path, "masked-lm", _BERT, data, cases)


def _check(tmp_path: Path, task: str, model: dict[str, Any], data: dict[str, Any], cases: list[ParityCase]) -> None:
    values = {"steps": 4, "task": {"name": task}, "model": model, "data": data, "optimizer": {"lr": 1e-2}}
    (tmp_path / "out").mkdir()
    rows = run_parity(parse_config(values, "test"), cases, tmp_path / "out")
    assert [row for row in rows if not row.passed] == []
