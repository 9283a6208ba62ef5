"""Adapters (LoRA) and frozen parameters beside one plain process: only the right ones move, and they do."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from trainer.config import parse_config
from trainer.parity.cases import ParityCase, parts_to_train
from trainer.parity.comparison import ParityRow, parity_cases, run_parity


def _restricted(group_sizes: list[int], *trained: Any) -> list[ParityCase]:
    return [case for case in parity_cases(group_sizes, (), trained=trained) if case.trained != "all"]


def _assert_all_pass(rows: list[ParityRow], num_cases: int) -> None:
    assert len(rows) == num_cases
    assert [row for row in rows if not row.passed] == []


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_engine_trains_parts_as_one_plain_process_does(values: dict[str, Any], tmp_path: Path) -> None:
    cases = _restricted([1, 2, 3, 4], "adapters", "some")
    assert len({(case.backend, case.strategy, case.num_ranks) for case in cases}) == 25
    _assert_all_pass(run_parity(parse_config(values, "test"), cases, tmp_path), len(cases))


@pytest.mark.timeout(400)
def test_parts_of_a_model_are_trained_alike_by_all(values: dict[str, Any], tmp_path: Path) -> None:
    cases = _restricted([2], "adapters", "some")
    assert len(cases) == 2 * 11
    cases += [
        ParityCase(strategy, 3, 2, "sgd", backend, trained=part)
        for part in ("adapters", "some")
        for backend, strategy in (("torch", "zero3"), ("bucketed", "zero3"), ("deepspeed", "zero2"))
    ]
    _assert_all_pass(run_parity(parse_config(values, "test"), cases, tmp_path), len(cases))


@pytest.mark.timeout(400)
def test_recomputation_changes_nothing(values: dict[str, Any], tmp_path: Path) -> None:
    pairs = (("torch", "ddp"), ("torch", "zero3"), ("bucketed", "zero3"), ("deepspeed", "zero3"))
    cases = [
        ParityCase(strategy, 2, 3, "sgd", backend, trained=part)
        for part in ("adapters", "some")
        for backend, strategy in pairs
    ]
    config = parse_config(values | {"activation_checkpointing": {"mode": "full"}}, "test")
    _assert_all_pass(run_parity(config, cases, tmp_path), len(cases))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_compilation_changes_nothing(values: dict[str, Any], tmp_path: Path) -> None:
    cases = [ParityCase("zero3", 2, 3, "sgd", trained=part) for part in ("adapters", "some")]
    cases += [ParityCase("zero3", 2, 3, "sgd", "bucketed", trained="adapters")]
    config = parse_config(values | {"compile": {"enabled": True}}, "test")
    _assert_all_pass(run_parity(config, cases, tmp_path), len(cases))


def _pretrained_classifier(folder: Path) -> Path:
    from transformers import BertConfig, BertForMaskedLM

    sizes = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    # Dropout as it comes: a tenth.
    BertForMaskedLM(BertConfig(vocab_size=301, **sizes)).save_pretrained(folder)
    return folder


@pytest.mark.timeout(400)
def test_adapters_and_a_new_head_beside_pretrained_weights(values: dict[str, Any], tmp_path: Path) -> None:
    model = {
        "pretrained": str(_pretrained_classifier(tmp_path / "bert")),
        "new_head": True,
        "lora": {"rank": 3, "alpha": 48.0, "dropout": 0.3, "targets": ["query", "*.value"]},
    }
    task = {"name": "tests.trainer.model.head_tasks:ParityOfFirst"}
    data = values["data"] | {"tokenizer": "train-bpe"}
    optimizer = values["optimizer"] | {"layer_decay": 0.7, "groups": [{"pattern": "*lora_B*", "lr_scale": 4.0}]}
    config = parse_config(values | {"model": model, "task": task, "data": data, "optimizer": optimizer}, "test")
    assert parts_to_train(config) == ("all",)
    cases = [
        ParityCase(strategy, 2, 3, "sgd", backend) for backend, strategy in (("torch", "zero3"), ("deepspeed", "zero2"))
    ]
    _assert_all_pass(run_parity(config, cases, tmp_path), len(cases))


def test_what_strays_or_stays_is_a_failure(values: dict[str, Any], tmp_path: Path) -> None:
    (row,) = run_parity(parse_config(values, "test"), [ParityCase("none", 1, 3, "sgd", trained="some")], tmp_path)
    assert row.passed
    assert not replace(row, strayed=["model.norm.weight"]).passed
    assert not replace(row, unmoved=["model.norm.weight"]).passed
    frozen = row.case.frozen
    assert "model.embed_tokens.weight" in frozen
    before, after = (load_file(tmp_path / f"{row.case.label}.{when}.safetensors") for when in ("initial", "final"))
    assert {name for name, tensor in before.items() if torch.equal(tensor, after[name])} == set(frozen)
