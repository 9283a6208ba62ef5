"""Every strategy against one plain process: 2 and 3 ranks, hsdp on 4, shapes that do not divide."""

import io
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.support import TINY_MODEL
from trainer.config import parse_config
from trainer.config.rules import BACKEND_STRATEGIES
from trainer.parity import cases as parity_cases_module
from trainer.parity.cases import ParityCase
from trainer.parity.comparison import ParityRow, _relative, parity_cases, run_parity
from trainer.parity.table import print_table, row_values


@pytest.mark.timeout(800)
def test_every_strategy_trains_as_one_plain_process(values: dict[str, Any], tmp_path: Path) -> None:
    cases = parity_cases([1, 2, 3, 4], computes=("fp32", "bf16", "fp16"))
    in_16_bits = {(case.backend, case.strategy) for case in cases if case.compute == "bf16"}
    assert len(in_16_bits) == 14
    assert in_16_bits == {(case.backend, case.strategy) for case in cases if case.compute == "fp16"}
    assert {case.strategy for case in cases} == {"none", "ddp", "zero1", "zero2", "zero3", "hsdp"}
    assert {case.num_ranks for case in cases if case.strategy == "hsdp"} == {4}
    assert {case.num_ranks for case in cases if case.strategy == "zero2"} == {2, 3}
    assert all(
        {case.accumulation_steps > 1 for case in cases if case.strategy == strategy} == {True, False}
        for strategy in ("none", "ddp", "zero1", "zero2", "zero3", "hsdp")
    )
    for num_ranks in (2, 3):
        pairs = {(case.backend, case.strategy) for case in cases if case.num_ranks == num_ranks}
        legal = {(backend, strategy) for backend, all_ in BACKEND_STRATEGIES.items() for strategy in all_}
        # On GPUs alone; hsdp has a group of its own, and none runs on one rank.
        assert legal - pairs == {
            ("accelerate", "zero3"),
            ("torch", "hsdp"),
            ("bucketed", "hsdp"),
            ("torch", "none"),
        }
    rows = run_parity(parse_config(values, "test"), cases, tmp_path)
    assert len(rows) == len(cases)
    assert [row for row in rows if not row.passed] == []


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    "model",
    [
        # Cross-attention that nothing uses; a norm that is registered after the blocks and runs before them.
        {
            "architecture": "bart",
            "config": {"d_model": 30, "decoder_layers": 2, "decoder_attention_heads": 3, "decoder_ffn_dim": 53},
        },
        # A persistent buffer, e_score_correction_bias.
        {
            "architecture": "deepseek_v3",
            "config": {
                "hidden_size": 32,
                "intermediate_size": 53,
                "moe_intermediate_size": 16,
                "num_hidden_layers": 2,
                "first_k_dense_replace": 1,
                "n_routed_experts": 4,
                "num_experts_per_tok": 2,
                "n_group": 1,
                "topk_group": 1,
                "num_attention_heads": 3,
                "num_key_value_heads": 3,
                "q_lora_rank": 8,
                "kv_lora_rank": 8,
                "qk_nope_head_dim": 6,
                "qk_rope_head_dim": 4,
                "v_head_dim": 6,
            },
        },
        # Blocks that share all of a transformer layer.
        {
            "architecture": "zamba2",
            "config": {
                "hidden_size": 32,
                "intermediate_size": 53,
                "num_hidden_layers": 3,
                "layers_block_type": ["mamba", "hybrid", "hybrid"],
                "num_mem_blocks": 1,
                "num_attention_heads": 4,
                "mamba_headdim": 16,
                "n_mamba_heads": 4,
                "mamba_d_state": 8,
                "adapter_rank": 4,
            },
        },
    ],
    ids=lambda model: model["architecture"],
)
def test_other_architectures_do_so_too(values: dict[str, Any], tmp_path: Path, model: dict[str, Any]) -> None:
    cases = [ParityCase(strategy, 2, 3, "sgd") for strategy in ("ddp", "zero1", "zero3")]
    cases += [ParityCase(strategy, 2, 3, "sgd", backend="bucketed") for strategy in ("zero2", "zero3")]
    rows = run_parity(parse_config(values | {"model": model}, "test"), cases, tmp_path)
    assert [row for row in rows if not row.passed] == []


@pytest.mark.timeout(400)
def test_a_loss_in_chunks_is_the_same_under_every_mechanism(values: dict[str, Any], tmp_path: Path) -> None:
    # A chunk of 7 does not divide the positions of any micro-batch.
    config = parse_config(values | {"task": {"loss_chunk_tokens": 7}}, "test")
    cases = [case for case in parity_cases([2], ()) if case.accumulation_steps > 1]
    assert len({(case.backend, case.strategy) for case in cases}) == len(cases) == 11
    rows = run_parity(config, cases, tmp_path)
    assert [row for row in rows if not row.passed] == []


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("chunk_tokens", [0, 7])
def test_so_is_a_compiled_one(values: dict[str, Any], tmp_path: Path, chunk_tokens: int) -> None:
    sections = {"task": {"loss_chunk_tokens": chunk_tokens}, "compile": {"enabled": True}}
    cases = [case for case in parity_cases([2], ()) if case.accumulation_steps > 1]
    rows = run_parity(parse_config(values | sections, "test"), cases, tmp_path)
    assert [row for row in rows if not row.passed] == []


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_eight_bit_moments_are_the_same_in_every_layout(values: dict[str, Any], tmp_path: Path) -> None:
    model = {"architecture": "llama", "config": TINY_MODEL["config"] | {"hidden_size": 96, "intermediate_size": 130}}
    groups = [{"pattern": "*.layers.0.*", "lr_scale": 0.5}, {"pattern": "*embed*", "weight_decay": 0.0}]
    optimizer = {"name": "adamw8bit", "lr": 1e-2, "groups": groups}
    cases = [ParityCase(strategy, 3, 2, "adamw8bit") for strategy in ("ddp", "zero1", "zero2", "zero3")]
    rows = run_parity(parse_config(values | {"model": model, "optimizer": optimizer}, "test"), cases, tmp_path)
    assert [row for row in rows if not row.passed] == []


@pytest.mark.timeout(400)
def test_a_case_that_fails_is_a_row_and_the_others_go_on(values: dict[str, Any], tmp_path: Path) -> None:
    cases = [
        ParityCase("ddp", 2, 2, "sgd"),
        ParityCase("ddp", 2, 1, "sgd"),
        ParityCase("zero2", 2, 3, "sgd"),
        ParityCase("ddp", 2, 1, "sgd", compute="bf16"),
        ParityCase("zero2", 2, 1, "adamw", compute="bf16"),
    ]
    config = parse_config(values | {"task": {"name": "tests.trainer.tasks.failing_task:FailingTask"}}, "test")
    rows = {row.case: row for row in run_parity(config, cases, tmp_path)}
    assert set(rows) == set(cases)
    raising, good, killed, *in_bf16 = (rows[case] for case in cases)
    assert re.fullmatch(r"rank [01]: ValueError: struck on purpose", raising.failure)
    # Whoever notices first says so: the parent, or the rank whose collective broke.
    assert "SIGKILL" in killed.failure or killed.failure.startswith("rank 0: ")
    assert not raising.passed
    assert not killed.passed
    assert good.passed
    assert all(row.passed for row in in_bf16)
    losses = [
        json.loads((tmp_path / f"torch-ddp-2-1-sgd-{compute}.json").read_text())["losses"]
        for compute in ("fp32", "bf16")
    ]
    assert losses[0] != pytest.approx(losses[1], rel=1e-6)
    console = Console(file=io.StringIO(), width=200)
    print_table(list(rows.values()), console)
    assert "struck on purpose" in console.file.getvalue()  # type: ignore[attr-defined]


def test_cases_of_a_package_that_is_missing_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity_cases_module, "find_spec", lambda name: None if name == "deepspeed" else object())
    cases = parity_cases([2])
    assert {case.backend for case in cases if case.missing_package == "deepspeed"} == {"deepspeed"}
    assert {case.backend for case in cases if case.missing_package is None} == {"torch", "bucketed", "accelerate"}


_GOOD = ParityRow(ParityCase("ddp", 2, 1, "sgd"), 1e-7, 1e-7, 1e-7, [], True, True)


def test_a_row_passes_only_inside_every_tolerance() -> None:
    assert _GOOD.passed
    for wrong in (
        {"loss_difference": 2e-5},
        {"loss_difference": float("nan")},
        {"grad_norm_difference": 2e-5},
        {"parameter_difference": 2e-5},
        {"unmoved": ["lm_head.weight"]},
        {"forward_saw_update": False},
        {"same_initial_parameters": False},
    ):
        assert not replace(_GOOD, **wrong).passed, wrong


def test_what_is_not_a_number_is_no_small_difference() -> None:
    assert math.isnan(_relative([1.0, math.nan], [1.0, 1.0]))
    assert _relative([1.0, 3.0], [1.0, 2.0]) == 0.5


def test_a_row_is_told_to_programs() -> None:
    values = row_values(replace(_GOOD, failure="it broke", loss_difference=math.nan))
    assert (values["backend"], values["num_ranks"]) == (_GOOD.case.backend, _GOOD.case.num_ranks)
    assert (values["passed"], values["problems"]) == (False, ["it broke"])
    assert row_values(_GOOD)["passed"]


def test_what_a_library_says_of_a_failure_is_shown_as_it_is() -> None:
    said = "rank 0: RuntimeError: [/src/gloo/transport/tcp/pair.cc:553] Connection closed by peer"
    console = Console(file=io.StringIO(), width=200)
    print_table([replace(_GOOD, failure=said)], console)
    assert said in console.file.getvalue()  # type: ignore[attr-defined]
