"""``shardline bench scaling``: its plan, its arithmetic on rows made by hand, and the whole of it at the tiny size."""

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from benchmarks.measure.sizes import SIZES
from benchmarks.presentation.result_files import name_of
from benchmarks.scaling.__main__ import main
from benchmarks.scaling.plan import plan_races, rank_counts
from benchmarks.scaling.table import efficiency, markdown, plot, read_races, series
from sharding.ranks.errors import UserError
from tests.benchmarks.header import result_header
from tests.support import shardline
from trainer.metrics.paired_times import Ratio


@pytest.mark.parametrize(
    ("num_nodes", "ranks_per_node", "counts"),
    [(1, 1, [1]), (1, 4, [1, 2, 4]), (2, 4, [1, 2, 4, 8]), (3, 4, [1, 2, 4, 8, 12]), (4, 6, [1, 2, 4, 6, 12, 24])],
)
def test_ranks_double_up_to_a_node_and_nodes_up_to_all(num_nodes: int, ranks_per_node: int, counts: list[int]) -> None:
    assert rank_counts(num_nodes, ranks_per_node) == counts


def test_weak_shares_stay_and_strong_batches_stay_and_they_have_a_point_in_common() -> None:
    races = plan_races(
        SIZES["tiny"], [], counts=[1, 2, 4], modes=["weak", "strong"], strategies=["ddp", "zero3"], has_gpu=False
    )
    points = {(race.num_ranks, race.strategy, *race.modes): race.global_size for race in races}
    assert points == {
        (1, "none", "weak"): 4,
        (1, "none", "strong"): 8,
        (2, "ddp", "weak", "strong"): 8,
        (2, "zero3", "weak", "strong"): 8,
        (4, "ddp", "weak"): 16,
        (4, "zero3", "weak"): 16,
        (4, "ddp", "strong"): 8,
        (4, "zero3", "strong"): 8,
    }
    assert len({race.label for race in races}) == len(races)
    odd = plan_races(SIZES["tiny"], [], counts=[1, 2, 3], modes=["strong"], strategies=["ddp"], has_gpu=False)
    assert {race.global_size for race in odd} == {2 * 6}
    with pytest.raises(UserError, match=r"batch\.global_size=8: shardline bench scaling decides this"):
        plan_races(SIZES["tiny"], ["batch.global_size=8"], counts=[1], modes=["weak"], strategies=[], has_gpu=False)
    for alone in (
        *("compile.enabled=true", "activation_checkpointing.mode=full"),
        *("precision.compute=fp16", "precision.compute=fp8"),
    ):
        with pytest.raises(UserError, match=f"{alone}: .*contestants of a race"):
            plan_races(SIZES["tiny"], [alone], counts=[1], modes=["weak"], strategies=[], has_gpu=False)


def _race(strategy: str, num_ranks: int, modes: list[str], times: dict[str, list[float]]) -> list[dict[str, Any]]:
    """A race of 4 sequences of 8 tokens a rank; both ranks take the same time but for the last, which is faster."""
    label = f"{strategy} {num_ranks}x4"
    race = {"modes": modes, "strategy": strategy, "num_ranks": num_ranks}
    rows: list[dict[str, Any]] = [
        {"race": label, "kind": "race", **race, "global_size": 4 * num_ranks, "sequence_length": 8}
    ]
    rows += [{"race": label, "kind": "warmup", "wall_s": {name: [9.0] * num_ranks for name in times}}]
    for values in zip(*times.values(), strict=True):
        wall_s = {name: [time] * (num_ranks - 1) + [0.9 * time] for name, time in zip(times, values, strict=True)}
        if num_ranks == 1:
            wall_s = {name: [time] for name, time in zip(times, values, strict=True)}
        rows.append({"race": label, "kind": "round", "wall_s": wall_s})
    return rows


def _header(**values: Any) -> dict[str, Any]:
    own: dict[str, Any] = {
        "size": "tiny",
        "counts": [1, 4],
        "ranks_per_node": 4,
        "threads": 1,
        "num_warmup": 12,
        "num_pairs": 3,
        "steps_per_turn": 1,
        "num_profiled": 2,
        "config": {
            "model": {"architecture": "llama"},
            "batch": {"micro_size": 2},
            "data": {"sequence_length": 8},
            "precision": {"compute": "auto"},
        },
    }
    return result_header("scaling", **own | values)


_PROFILE = {"compute": [0.6, 0.5], "memory": [0.1, 0.1], "communication": [0.2, 0.3], "input": [0.0, 0.0]}
_RACE_ON_ONE = _race("none", 1, ["weak"], {"plain": [1.0, 1.0, 1.0], "shardline": [1.1, 1.1, 1.1]})
_ROWS = [
    _header(),
    *_RACE_ON_ONE,
    *_race(
        "zero2", 4, ["weak"], {"deepspeed": [5.0, 5.0, 5.0], "plain": [4.0, 4.0, 4.0], "shardline": [2.0, 2.0, 2.0]}
    ),
    {
        "race": "zero2 4x4",
        "kind": "profile",
        "contestant": "shardline",
        **_PROFILE,
        "host": [0.1, 0.1],
        "communication_busy": [0.4, 0.4],
        "step_s": [2.5, 2.5],
    },
    {"race": "zero2 4x4", "kind": "losses", "contestant": "shardline", "largest_difference": 2e-7},
]


def test_rows_become_rates_efficiencies_and_ratios() -> None:
    one, four = read_races(_ROWS)
    assert list(four.times) == ["plain", "shardline", "deepspeed"]
    # 16 sequences of 8 tokens in 2 s, the slower rank's.
    assert four.tokens_per_s("shardline") == 64.0
    # 16 tokens/s and rank of the 32 that the plain loop has on one.
    assert efficiency(four, "shardline", one) == Ratio(0.5, 0.5, 0.5)
    assert efficiency(four, "plain", one).value == 0.25
    assert efficiency(one, "shardline", one).value == pytest.approx(1 / 1.1)
    assert four.ratio("shardline") == Ratio(0.5, 0.5, 0.5)
    assert four.ratio("plain") is None
    assert four.profiles["shardline"]["communication"] == pytest.approx(0.25)
    rates, ratios = series(_ROWS)
    assert rates["zero2 4x4 deepspeed"].values == pytest.approx([25.6] * 3)
    assert set(ratios) == {"none 1x4 shardline", "zero2 4x4 shardline", "zero2 4x4 deepspeed"}


def test_the_table_says_what_was_measured_and_what_cannot_be() -> None:
    table = markdown(_ROWS, "raw.jsonl")
    assert "4 ranks of 1 threads share 2 cores, so that the most efficiency that is possible is 50% on 4." in table
    row = (
        "| 4 on 2 cores | shardline | 16 | 2000.0 | 64 | 16 | 50.0% | 50.0% to 50.0% | 0.500 | 0.500 to 0.500 | 25.0% |"
    )
    assert f"{row} 2e-07 |" in table
    assert "zero2 4x4, at most 1.03 wanted: shardline met (upper end 0.500), faster than every peer." in table
    assert (
        "zero2 4x4: shardline is bound by compute: 55% of a step is matrix products and attention; 25% could be"
        in table
    )
    assert "interrupted" not in table
    assert "3 pairs of 3 planned: interrupted" in markdown([_header(counts=[1, 2, 4]), *_ROWS[1:]], "raw.jsonl")
    assert "3 pairs of 60 planned: interrupted" in markdown([_header(num_pairs=60), *_ROWS[1:]], "raw.jsonl")
    drawn = ElementTree.fromstring(plot(_ROWS))
    assert "weak, zero2" in [element.text for element in drawn.iter("{http://www.w3.org/2000/svg}text")]
    # One rank alone, and nothing at all.
    assert ">weak, none<" in plot(_ROWS[: 1 + len(_RACE_ON_ONE)])
    assert "</svg>" in plot(_ROWS[:1])
    assert "0 pairs of 3 planned: interrupted" in markdown(_ROWS[:1], "raw.jsonl")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--size", "huge"), "--size huge: there is no such size"),
        (("--size", "llama-1b"), "--size llama-1b needs a GPU"),
        (("--ranks", "0"), "--ranks 0: write numbers"),
        (("--strategies", "zero4"), "--strategies zero4: there is no zero4; there are ddp, zero1, zero2, zero3."),
        (("--contestants", "shardline"), "--contestants shardline: plain, which others are compared with, is missing"),
        (("--pairs", "0"), "--pairs 0: at least 12 steps of warm-up"),
        (("--allocation", "2"), "--allocation 2: write nodes x ranks of each"),
    ],
)
def test_bad_input_is_named(
    arguments: tuple[str, ...], complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--output", str(tmp_path / "out")]) == 2
    assert complaint in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def _data(shared_corpus: tuple[Path, Path]) -> list[str]:
    corpus, cache = shared_corpus
    return [
        *("data.source=text", f"data.paths=[{corpus}]", f"data.cache_dir={cache}", "data.vocab_size=301"),
        "data.validation_fraction=0.2",
    ]


def _check_races(rows: list[dict[str, Any]], expected: dict[str, set[str]]) -> None:
    """Every contestant took part in every race, did the same work, and was profiled."""
    found = {race.label: race for race in read_races(rows)}
    assert {label: set(race.times) for label, race in found.items()} == expected
    for race in found.values():
        assert max(race.loss_differences.values()) <= 1e-4
        assert set(race.profiles) == set(race.times)
        for profile in race.profiles.values():
            shares = {name: profile[name] for name in ("compute", "memory", "communication", "input", "host")}
            assert sum(shares.values()) == pytest.approx(1.0)
            assert min(shares["compute"], shares["memory"], shares["input"]) > 0
            assert profile["communication_busy"] >= shares["communication"]
            assert (profile["communication_busy"] > 0) is (race.num_ranks > 1)


@pytest.mark.timeout(400)
def test_a_strategy_is_measured_over_ranks(tmp_path: Path, shared_corpus: tuple[Path, Path]) -> None:
    options = ("--size", "tiny", "--ranks", "1,2", "--modes", "weak", "--strategies", "zero2", "--pairs", 2)
    finished = shardline(
        *("bench", "scaling", "--", *options, "--output", tmp_path), *_data(shared_corpus), timeout_s=380
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    (raw,) = tmp_path.glob("*_2xcpu/scaling.jsonl")
    rows = [json.loads(line) for line in raw.read_text().splitlines()]
    assert rows[0]["kind"] == "header"
    assert rows[0]["packages"]["deepspeed"]
    alone, two = {"plain", "shardline"}, {"plain", "shardline", "shardline bucketed", "deepspeed"}
    _check_races(rows, {"none 1x4": alone, "zero2 2x4": two})
    assert raw.with_suffix(".md").read_text() in finished.stdout
    ElementTree.fromstring(raw.with_suffix(".svg").read_text())
    assert {path.suffix for path in raw.parent.iterdir()} == {".jsonl", ".md", ".svg", ".log"}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_strategy_is_measured_and_a_repeated_result_is_compared(
    tmp_path: Path, shared_corpus: tuple[Path, Path]
) -> None:
    sharded = {"plain", "shardline", "shardline bucketed", "deepspeed"}
    expected = {
        "ddp 3x4": {"plain", "shardline", "accelerate", "fabric", "transformers"},
        "zero1 3x4": sharded,
        "zero2 3x4": sharded,
        "zero3 3x4": sharded,
    }
    for _ in range(2):
        finished = shardline(
            *("bench", "scaling", "--", "--size", "tiny", "--ranks", "3", "--modes", "weak", "--pairs", 4),
            *("--output", tmp_path),
            *_data(shared_corpus),
            timeout_s=440,
        )
        assert finished.returncode == 0, finished.stdout + finished.stderr
    (older,), (newer,) = (tmp_path.glob(f"*_3xcpu/{name}.jsonl") for name in ("scaling", "scaling-2"))
    _check_races([json.loads(line) for line in newer.read_text().splitlines()], expected)
    table = newer.with_suffix(".md").read_text()
    assert f"Since `{name_of(older)}`" in table
    assert "of 17 rows differ by more than noise" in table
    assert "of 13 rows differ by more than noise" in table
