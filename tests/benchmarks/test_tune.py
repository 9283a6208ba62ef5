"""What ``shardline tune`` tries, and a search on two ranks."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks.measure.sizes import QUICKSTART
from benchmarks.tune.__main__ import _why, main
from benchmarks.tune.plan import (
    Candidate,
    Trial,
    equals,
    gives_up,
    layouts,
    micro_sizes,
    pareto,
    refinements,
    table_rows,
    verdict,
)
from benchmarks.tune.table import show
from tests.support import TINY_MODEL, write_config
from trainer.config import load_config

GIB = 2**30


def trial(candidate: Candidate, rate: float | None = None, peak_gib: float = 0.0, reason: str = "") -> Trial:
    rates = () if rate is None else (rate,)
    return Trial(candidate, GIB, rates, None if rate is None else int(peak_gib * GIB), reason)


def test_the_global_batch_stays() -> None:
    assert micro_sizes(24, 2) == [1, 2, 3, 4, 6, 12]
    assert micro_sizes(3, 3) == [1]


def test_one_rank_has_nothing_to_divide() -> None:
    assert [one.layout for one in layouts(1, ["ddp", "zero3"])] == ["none"]
    names = ["ddp", "zero1", "zero1 bucketed", "zero3", "zero3 bucketed"]
    assert [one.layout for one in layouts(2, ["ddp", "zero1", "zero3"])] == names


def test_larger_micro_batches_are_given_up_after_two_slower_ones() -> None:
    assert not gives_up([100.0, 90.0])
    assert not gives_up([100.0, 90.0, 98.0])
    assert not gives_up([100.0, 120.0, 110.0])
    assert gives_up([100.0, 120.0, 110.0, 111.0])


def test_the_front_has_what_no_other_beats_in_both() -> None:
    fast = trial(Candidate(4, "ddp"), 100.0, 8.0)
    small = trial(Candidate(4, "zero3"), 80.0, 3.0)
    beaten = trial(Candidate(2, "ddp"), 79.0, 3.5)
    lost = trial(Candidate(8, "ddp"), reason="out of memory")
    assert pareto([beaten, lost, small, fast]) == [fast, small]
    rows = table_rows([beaten, lost, small, fast])
    assert [row[0] for row in rows] == ["*", "*", "", ""]
    assert rows[0] == ("*", "ddp, micro 4", "100", "-", "8.00", "1.00", "")
    assert rows[-1] == ("", "ddp, micro 8", "-", "-", "-", "1.00", "out of memory")


def test_a_terminal_gets_a_table_and_a_pipe_gets_markdown() -> None:
    trials = [trial(Candidate(4, "ddp"), 100.0, 8.0), trial(Candidate(8, "ddp"), reason="failed: [bold] is a word")]
    shown = {}
    for is_terminal in (True, False):
        file = io.StringIO()
        console = Console(file=file, force_terminal=is_terminal, width=140, color_system=None)
        show(table_rows(trials), verdict(trials, []), console)
        shown[is_terminal] = file.getvalue()
    for text in shown.values():
        assert "failed: [bold] is a word" in text
        assert "* no other is both faster and smaller" in text
        assert text.splitlines()[-1].startswith("fastest: batch.micro_size=4 parallel.strategy=ddp ")
    assert "\u2502 ddp, micro 4" in shown[True]
    assert "| " not in shown[True]
    assert "| * | ddp, micro 4 | 100 |" in shown[False]


def test_an_interval_is_shown_and_what_is_as_fast_within_noise() -> None:
    fast = Trial(Candidate(4, "ddp"), GIB, (90.0, 100.0, 102.0, 110.0, 101.0), 8 * GIB)
    alike = Trial(Candidate(4, "zero2"), GIB, (88.0, 99.0, 100.0, 108.0, 100.0), 9 * GIB)
    slow = Trial(Candidate(1, "ddp"), GIB, (50.0, 51.0, 50.0, 52.0, 50.5), 2 * GIB)
    assert equals([slow, alike, fast]) == [alike]
    low, _, high = table_rows([slow, alike, fast])[0][3].partition(" to ")
    assert 90 <= float(low) < 101 < float(high) <= 110
    said = verdict([slow, alike, fast], [])
    assert said.startswith("fastest: batch.micro_size=4 parallel.strategy=ddp ")
    assert said.endswith("\nas fast within the noise of this search: zero2, micro 4")


def test_a_search_that_was_cut_short_names_what_is_missing() -> None:
    said = verdict([trial(Candidate(1, "ddp"), 50.0, 2.0)], ["zero3", "zero3 bucketed", "compiled blocks"])
    assert said.startswith("fastest of what was measured: batch.micro_size=1 ")
    assert said.endswith("not tried, or not to the end: zero3; zero3 bucketed; compiled blocks")
    assert verdict([], ["ddp"]).startswith("nothing could be measured\ncut short")


def test_what_an_interrupted_search_had_still_to_try(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any, **__: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("benchmarks.tune.__main__.run_ranks", interrupted)
    config = write_config(tmp_path / "run.yaml", values)
    assert main([str(config), "--strategies", "ddp,zero2", "--output", str(tmp_path)]) == 130
    assert (
        "cut short, and any of it may be faster: not tried, or not to the end: ddp; zero2; zero2 bucketed; compiled "
        "blocks and recomputed activations"
    ) in capfd.readouterr().out


def test_recomputation_is_tried_where_a_run_did_not_fit() -> None:
    trials = [
        trial(Candidate(2, "ddp"), 100.0, 8.0),
        trial(Candidate(4, "ddp"), reason="out of memory"),
        trial(Candidate(2, "zero3"), 90.0, 4.0),
    ]
    tried = refinements(trials, with_compile=True)
    assert [one.label for one in tried] == [
        "ddp, micro 2, compiled",
        "ddp, micro 2, checkpointing selective",
        "ddp, micro 2, checkpointing full",
        "ddp, micro 4, checkpointing selective",
        "ddp, micro 4, checkpointing full",
    ]
    nothing_fits = [trial(Candidate(1, "zero3"), reason="out of memory")]
    assert [one.checkpointing for one in refinements(nothing_fits, with_compile=True)] == ["selective", "full"]


def test_what_it_recommends_is_a_configuration(values: dict[str, Any], tmp_path: Path) -> None:
    path = write_config(tmp_path / "run.yaml", values)
    for one in [*layouts(2, ["ddp", "zero1", "zero2", "zero3"]), Candidate(3, "zero2", "bucketed", "selective", True)]:
        config = load_config(path, one.overrides)
        assert (config.batch.micro_size, config.parallel.strategy) == (one.micro_size, one.strategy)
        assert (config.parallel.backend, config.compile.enabled) == (one.backend, one.compiles)


@pytest.mark.parametrize(
    ("said", "status", "reason"),
    [
        ("x\ntorch.OutOfMemoryError: CUDA out of memory. Tried to", 1, "out of memory"),
        ("DefaultCPUAllocator: can't allocate memory. Error code 12 (Cannot allocate memory)", 1, "out of memory"),
        ("error: a rank was killed by SIGKILL\n", 1, "out of memory"),
        ("Traceback\nValueError: no\n", 1, "failed: ValueError: no"),
        ("", 1, "failed with status 1"),
    ],
)  # fmt: skip
def test_memory_is_told_from_other_failures(said: str, status: int, reason: str) -> None:
    assert _why(said, status) == reason


def test_what_tune_tries_itself_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(QUICKSTART), "parallel.strategy=zero3"]) == 2
    assert "parallel.strategy=zero3: shardline tune tries these itself" in capsys.readouterr().err


@pytest.mark.timeout(300)
def test_a_search_on_two_ranks_goes_on_after_running_out_of_memory(
    values: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    # Eager attention keeps its scores, of which the formula, which has the least of activations, knows nothing.
    values["batch"] = {"global_size": 4, "micro_size": 1}
    values["model"] = TINY_MODEL | {"attention": "eager"}
    values["model"]["config"] = TINY_MODEL["config"] | {"max_position_embeddings": 2560}
    values["data"]["sequence_length"] = 2560
    config = write_config(tmp_path / "run.yaml", values)
    options = [
        "--strategies",
        "ddp",
        "--steps",
        "1",
        "--warmup",
        "1",
        "--no-compile",
        "--no-recompute",
        "--memory-gib",
        "0.72",
    ]
    status = main([str(config), *options, "--output", str(tmp_path), "--json"])
    captured = capfd.readouterr()
    # What is said meanwhile goes aside.
    printed = captured.err
    assert status == 0, printed
    document = json.loads(captured.out)
    assert document["use"][:2] == ["batch.micro_size=1", "parallel.strategy=ddp"]
    assert document["trials"][0]["tokens_per_s"] > 0
    assert "out of memory" in {trial["reason"] for trial in document["trials"]}
    (raw,) = tmp_path.glob("*_2xcpu/tune.jsonl")
    rows = [json.loads(line) for line in raw.read_text().splitlines()]
    assert {row["config"]["batch"]["global_size"] for row in rows if row["kind"] == "rung"} == {4}
    assert "out of memory" in printed
    assert "fastest: batch.micro_size=1 parallel.strategy=ddp" in printed
