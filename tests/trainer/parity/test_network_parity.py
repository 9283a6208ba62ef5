"""Small networks on rows beside one plain process: batch normalisation, recurrent layers, embeddings, own models."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from trainer.config import RunConfig, parse_config
from trainer.data.facts import SampleFacts
from trainer.parity.batch import without_dropout
from trainer.parity.cases import ParityCase
from trainer.parity.comparison import parity_cases, run_parity

_TASK = {"name": "tests.sharding.network_cases:RowClassification"}
_CNN = {"channels": [4, 5], "hidden_sizes": [16], "batch_norm": True, "activation": "prelu", "dropout": 0.5}


def own_model(*, facts: SampleFacts, num_outputs: int, width: int) -> nn.Module:
    """What ``model.factory`` names below."""
    assert facts.image_shape is not None

    class _Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(64, width)
            self.norm = nn.BatchNorm1d(width, momentum=None)
            self.last = nn.Linear(width, num_outputs)

        def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
            output: torch.Tensor = self.last(self.norm(self.first(pixel_values.flatten(1))).relu())
            return output

    return _Own()


def _config(tmp_path: Path, model: dict[str, Any], data: dict[str, Any] | None = None) -> RunConfig:
    values = {
        "steps": 4,
        "task": _TASK,
        "model": model,
        "data": {"format": "rows", "cache_dir": str(tmp_path / "cache"), **(data or {"source": "digits"})},
        "optimizer": {"lr": 1e-2},
    }
    return parse_config(values, "test")


def _failed(config: RunConfig, cases: list[ParityCase], folder: Path) -> list[Any]:
    folder.mkdir()
    rows = run_parity(config, cases, folder)
    assert len(rows) == len(cases)
    return [row for row in rows if not row.passed]


@pytest.mark.timeout(600)
def test_a_network_with_batch_norm_under_every_engine(tmp_path: Path) -> None:
    cases = [case for case in parity_cases([2], ["adamw"], ["bf16"]) if case.accumulation_steps > 1]
    assert {case.compute for case in cases} == {"fp32", "bf16"}
    assert len({(case.backend, case.strategy) for case in cases}) == 11
    cases += [ParityCase(strategy, 3, 2, "sgd") for strategy in ("ddp", "zero3")]
    # One row of each rank in a micro-batch.
    cases += [ParityCase("hsdp", 4, 3, "sgd"), ParityCase("none", 1, 3, "sgd")]
    cases += [ParityCase("zero2", 2, 3, name) for name in ("muon", "adafactor")]
    assert _failed(_config(tmp_path, {"builtin": "cnn", "arguments": _CNN}), cases, tmp_path / "out") == []
    batch = load_file(tmp_path / "out" / "batch.safetensors")
    # A micro-batch of every layout has no target.
    assert batch["labels"].tolist()[:3] == [-100] * 3
    assert min(batch["labels"].tolist()[3:]) >= 0
    one = json.loads((tmp_path / "out" / "torch-ddp-2-3-sgd-fp32.json").read_text())
    assert len(set(one["losses"])) == 3


@pytest.mark.timeout(400)
def test_a_model_of_ones_own_does_so_too(tmp_path: Path) -> None:
    model = {"factory": "tests.trainer.parity.test_network_parity:own_model", "arguments": {"width": 9}}
    cases = [ParityCase("ddp", 2, 3, "sgd"), ParityCase("zero3", 2, 1, "sgd", "bucketed")]
    assert _failed(_config(tmp_path, model), cases, tmp_path / "out") == []
    # It has no blocks, whose matrices muon is for.
    assert run_parity(_config(tmp_path, model), [ParityCase("ddp", 2, 3, "muon")], tmp_path / "out") == []


@pytest.mark.timeout(400)
def test_recurrent_layers_and_embeddings_do_so_too(tmp_path: Path) -> None:
    texts = tmp_path / "texts.jsonl"
    words = ["import", "return", "class", "while", "except", "lambda", "yield", "global", "assert"]
    lines = [
        {"text": " ".join(words[i % 5 : i % 5 + 1 + i % 4] * (1 + i % 3)), "label": words[i % 3]} for i in range(60)
    ]
    texts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = {"source": "jsonl", "paths": [str(texts)], "label": "label", "vocab_size": 300, "sequence_length": 32}
    model = {"builtin": "lstm", "arguments": {"embedding_size": 6, "hidden_size": 5, "num_layers": 2}}
    cases = [case for case in parity_cases([2], (), ["bf16"]) if case.accumulation_steps > 1]
    cases = [case for case in cases if (case.backend, case.strategy) != ("torch", "zero1")]
    cases += [ParityCase("zero2", 2, 3, "muon")]
    assert _failed(_config(tmp_path, model, data), cases, tmp_path / "out") == []


def test_dropout_is_zero_whatever_it_is_called(tmp_path: Path) -> None:
    config = without_dropout(_config(tmp_path, {"builtin": "cnn", "arguments": _CNN}), tmp_path)
    assert config.model.arguments == {**_CNN, "dropout": 0.0}
    own = {"factory": "module:make", "arguments": {"drop_rate": 0.1, "width": 3, "scale": 0.5}}
    assert without_dropout(_config(tmp_path, own), tmp_path).model.arguments == {
        "drop_rate": 0.0,
        "width": 3,
        "scale": 0.5,
    }
    vit = {"architecture": "vit", "config": {"attention_probs_dropout_prob": 0.1}}
    fields = without_dropout(_config(tmp_path, vit), tmp_path).model.config
    assert fields["attention_probs_dropout_prob"] == fields["hidden_dropout_prob"] == 0.0
    recordings = without_dropout(_config(tmp_path, {"architecture": "wav2vec2"}), tmp_path).model.config
    assert recordings["mask_time_prob"] == recordings["layerdrop"] == 0.0
