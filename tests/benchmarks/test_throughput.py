"""``shardline bench throughput``: its ladder, its arithmetic on rows made by hand, and two of its rungs."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from benchmarks.measure.ladder import LADDER, Machine, rung_config
from benchmarks.measure.sizes import SIZES, Size
from benchmarks.throughput.__main__ import _chosen, main
from benchmarks.throughput.table import gains, markdown, plot, read_rungs
from sharding.ranks.errors import UserError
from tests.benchmarks.header import result_header
from tests.support import shardline
from trainer.config import load_config
from trainer.config.yaml_files import dump_yaml, parse_yaml

_CPU = Machine(num_ranks=2, has_gpu=False, has_bf16=False, fp8_recipes=(), tokenizer_size=2048)
_GPU = Machine(num_ranks=1, has_gpu=True, has_bf16=True, fp8_recipes=("tensorwise", "rowwise"), tokenizer_size=2048)
_RUNGS = {rung.name: rung for rung in LADDER}


def _left_out(machine: Machine, size: str) -> dict[str, str]:
    """Climb without measuring; what cannot run, and why."""
    kept: list[str] = []
    reasons = {}
    for rung in LADDER:
        try:
            rung_config(rung, SIZES[size], kept, [], machine, num_steps=10)
        except UserError as error:
            reasons[rung.name] = str(error)
            continue
        kept += rung.overrides if rung.is_kept else ()
    return reasons


def test_what_cannot_run_is_left_out_with_its_reason() -> None:
    reasons = _left_out(_CPU, "quickstart")
    assert reasons["+ bf16"] == "this device has no native bf16, which precision.compute=auto would choose"
    assert reasons["+ padded vocabulary"] == "the vocabulary of 2048 is a multiple of it already"
    assert "need a GPU" in reasons["autotuned kernels"]
    assert reasons["fp8 products"] == "this device has no such products in 8 bits"
    # The rules of a run say why not 8-bit moments in flat buckets.
    assert "adamw8bit" in reasons["8-bit moments"]
    on_gpu = _left_out(_GPU, "gpt2-124m")
    assert on_gpu == {
        "+ freed memory kept": "a GPU's tensors are not in the heap",
        "+ bucketed engine": "one rank has nobody to exchange buckets with",
        "fp8 products": "GPT-2 of transformers has no linear layers",
        "fp8 products, a scale a row": "GPT-2 of transformers has no linear layers",
    }
    older = replace(_GPU, fp8_recipes=("tensorwise",))
    assert "fp8 products" not in _left_out(older, "llama-1b")
    assert "no such products" in _left_out(older, "llama-1b")["fp8 products, a scale a row"]


def test_a_rung_has_what_the_ones_below_have_and_the_users_changes() -> None:
    kept = ["model.attention=sdpa", "precision.compute=bf16"]
    config = rung_config(_RUNGS["+ compiled blocks"], SIZES["gpt2-124m"], kept, ["batch.micro_size=8"], _GPU, 10)
    assert (config.model.attention, config.precision.compute, config.compile.enabled) == ("sdpa", "bf16", True)
    assert (config.batch.micro_size, config.batch.global_size, config.parallel.strategy) == (8, 16, "none")
    padded = rung_config(_RUNGS["+ padded vocabulary"], SIZES["gpt2-124m"], kept, ["batch.global_size=64"], _GPU, 10)
    assert (padded.model.vocab_multiple, padded.batch.global_size) == (128, 64)
    # Whether the lowest was measured, failed or was left out: what it stands for is beneath all.
    bare = rung_config(_RUNGS["+ bf16"], SIZES["llama-1b"], [], [], _GPU, 10)
    assert (bare.model.attention, bare.compile.enabled, bare.activation_checkpointing.mode) == ("eager", False, "none")
    one_billion = rung_config(LADDER[0], SIZES["llama-1b"], [], [], _GPU, 10)
    assert one_billion.model.config["vocab_size"] == 128256
    assert one_billion.data.sequence_length == 2048


def test_a_file_of_ones_own_keeps_its_batch_and_has_the_vocabulary_of_its_tokenizer(tmp_path: Path) -> None:
    own = Size(SIZES["quickstart"].config, ("batch.global_size=32",), has_own_batch=True)
    machine = replace(_CPU, tokenizer_size=2000)
    config = rung_config(_RUNGS["+ padded vocabulary"], own, [], [], machine, 10)
    assert (config.batch.global_size, config.model.vocab_multiple) == (32, 128)
    assert rung_config(LADDER[0], replace(own, has_own_batch=False), [], [], machine, 10).batch.global_size == 16


def test_a_files_own_backend_is_not_taken_for_a_rung(tmp_path: Path) -> None:
    own = Size(tmp_path / "own.yaml", has_own_batch=True)
    values = parse_yaml(SIZES["quickstart"].config.read_text())
    for key, backend, beneath in (
        ("backend", "bucketed", "torch"),
        ("engine", "bucketed", "torch"),
        ("backend", "deepspeed", "deepspeed"),
    ):
        own.config.write_text(dump_yaml(values | {"parallel": {key: backend}}))
        lowest = rung_config(LADDER[0], own, [], [], _CPU, 10)
        assert lowest.parallel.backend == beneath
    with pytest.raises(UserError, match="backend=deepspeed has no exchange but its own"):
        rung_config(_RUNGS["+ bucketed engine"], own, [], [], _CPU, 10)


def _rung(name: str, *, is_kept: bool, wall_s: list[float], data_wait_s: float = 0.0) -> list[dict[str, Any]]:
    config = {"batch": {"global_size": 4}, "data": {"sequence_length": 100}}
    rows: list[dict[str, Any]] = [{"kind": "rung", "row": name, "pass": 0, "is_kept": is_kept, "config": config}]
    rows.append({"kind": "model", "row": name, "flops_per_token": 50, "flops_per_token_causal": 40, "peak_flops": 1e4})
    for wall in wall_s:
        steps_s = [0.4 * wall, 0.6 * wall]
        rows.append({"kind": "window", "row": name, "wall_s": wall, "data_wait_s": data_wait_s, "steps_s": steps_s})
    return [*rows, {"kind": "memory", "row": name, "peak_bytes": 2**30}]


_HEADER = result_header(
    "throughput",
    size="tiny",
    num_ranks=2,
    threads=1,
    num_windows=3,
    window_steps=2,
    num_warmup=5,
    num_passes=1,
    config={
        "model": {"architecture": "llama"},
        "batch": {"micro_size": 2, "global_size": 4},
        "data": {"sequence_length": 100},
        "parallel": {"strategy": "zero2"},
    },
)
_ROWS = [
    _HEADER,
    *_rung("eager", is_kept=True, wall_s=[8.0, 8.0, 8.0], data_wait_s=0.08),
    *_rung("+ compiled", is_kept=True, wall_s=[4.0, 5.0, 4.0]),
    {"kind": "skipped", "row": "+ bf16", "reason": "it has none"},
    *_rung("checkpointing", is_kept=False, wall_s=[8.0, 8.0, 8.0]),
    *_rung("synthetic", is_kept=False, wall_s=[4.0, 4.0, 4.0]),
]


def test_windows_become_rates_steps_and_utilisation() -> None:
    eager, compiled, checkpointing, synthetic = read_rungs(_ROWS)
    # 2 steps of 4 sequences of 100 tokens in 8 s.
    assert eager.rates == [100.0] * 3
    assert (compiled.tokens_per_s, compiled.data_wait) == (200.0, 0.0)
    assert eager.data_wait == pytest.approx(0.01)
    # 100 tokens/s on each of 2 devices x 50 FLOP of 10^4 FLOP/s.
    assert compiled.mfu(causal=False) == pytest.approx(0.5)
    assert compiled.mfu(causal=True) == pytest.approx(0.4)
    assert checkpointing.steps_s[:2] == pytest.approx([3.2, 4.8])
    found = gains([eager, compiled, checkpointing, synthetic])
    assert {name: ratio.value for name, ratio in found.items()} == {
        "+ compiled": 2.0,
        "checkpointing": 0.5,
        # Over the compiled one: checkpointing did not stay.
        "synthetic": 1.0,
    }


def test_the_table_has_every_rung_and_says_what_is_missing() -> None:
    table = markdown(_ROWS, "raw.jsonl", ["Since then: nothing."])
    eager = "| eager | 100 | 100 to 100 | 50 |  |  | 4000.0 | 4800.0 | 25.0% | 20.0% | 1.00 | 1.00% |"
    assert eager in table
    assert "- + bf16: skipped, it has none" in table
    # One that fails has no figure, whatever it has measured before.
    failed = {"kind": "failed", "row": "+ compiled", "reason": "it ran out of memory"}
    assert [rung.name for rung in read_rungs([*_ROWS, failed])] == ["eager", "checkpointing", "synthetic"]
    assert "Since then: nothing." in table
    texts = [element.text for element in ElementTree.fromstring(plot(_ROWS)).iter("{http://www.w3.org/2000/svg}text")]
    assert "200 (MFU 50.0%)" in texts


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--rungs", "warp"), "--rungs warp: no rung has warp in its name"),
        (("--windows", "0"), "--windows 0 --window-steps 10"),
        (("--size", "gpt2-124m"), "--size gpt2-124m needs a GPU"),
        (("parallel.backend=bucketed",), "parallel.backend=bucketed: a rung of the ladder decides this"),
        (("parallel.engine=bucketed",), "parallel.engine=bucketed: a rung of the ladder decides this"),
    ],
)
def test_bad_input_is_named(
    arguments: tuple[str, ...], complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--output", str(tmp_path / "out")]) == 2
    assert complaint in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_lowest_rung_can_be_left_out() -> None:
    assert [rung.name for rung in _chosen("synthetic,bf16")] == ["+ bf16", "synthetic tokens"]
    assert _chosen("") == list(LADDER)


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_modes_with_cuda_graphs_are_refused_by_name(mode: str) -> None:
    with pytest.raises(UserError, match=f"compile.mode={mode} replays CUDA graphs"):
        load_config(SIZES["quickstart"].config, ["compile.enabled=true", f"compile.mode={mode}"])


@pytest.mark.timeout(300)
def test_rungs_are_measured(tmp_path: Path, shared_corpus: tuple[Path, Path]) -> None:
    corpus, cache = shared_corpus
    finished = shardline(
        *("bench", "throughput", "--", "--size", "tiny", "--nproc", 1, "--rungs", "eager,freed,synthetic,bucketed"),
        *("--windows", 2, "--window-steps", 3, "--warmup", 2, "--passes", 1, "--output", tmp_path),
        *("data.source=text", f"data.paths=[{corpus}]", f"data.cache_dir={cache}", "data.vocab_size=301"),
        timeout_s=280,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    (raw,) = tmp_path.glob("*_1xcpu/throughput_tiny.jsonl")
    rows = [json.loads(line) for line in raw.read_text().splitlines()]
    rungs = read_rungs(rows)
    assert [rung.name for rung in rungs] == ["eager attention, fp32", "+ freed memory kept", "synthetic tokens"]
    for rung in rungs:
        assert len(rung.rates) == 2
        assert len(rung.steps_s) == 6
        assert rung.peak_bytes > 50 * 2**20
        assert 0 < rung.data_wait < 1
    for window in (row for row in rows if row["kind"] == "window"):
        assert sum(window["steps_s"]) == pytest.approx(window["wall_s"], rel=0.05)
    table = raw.with_suffix(".md").read_text()
    assert table in finished.stdout
    assert "- + bucketed engine: skipped, one rank has nobody to exchange buckets with" in table
    assert {path.suffix for path in raw.parent.iterdir()} == {".jsonl", ".md", ".svg", ".log"}
