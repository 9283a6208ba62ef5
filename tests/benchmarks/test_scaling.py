"""``shardline bench scaling``: its plan, its arithmetic on rows made by hand, and the whole of it at the tiny size."""

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from benchmarks.contestants.deepspeed_loop import BEST_ON_CPU, tunings
from benchmarks.measure.sizes import SIZES
from benchmarks.presentation.result_files import RESULTS, name_of, read_rows
from benchmarks.scaling.__main__ import main
from benchmarks.scaling.changes import ratio_changes
from benchmarks.scaling.launches import estimate, first_start
from benchmarks.scaling.plan import plan_races, rank_counts
from benchmarks.scaling.races import efficiency, read_races
from benchmarks.scaling.table import markdown, plot
from sharding.config import Strategy
from sharding.ranks.errors import UserError
from tests.benchmarks.header import result_header
from tests.support import shardline


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


@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3"])
def test_peers_take_part_in_the_settings_that_were_fastest(strategy: Strategy) -> None:
    (raw,) = RESULTS.glob("*_2xcpu/scaling-settings.jsonl")
    (race,) = (race for race in read_races(read_rows(raw)) if race.strategy == strategy)
    ratios = {name: ratio.value for name in race.contestants if (ratio := race.ratio(name)) is not None}
    of_deepspeed = {tuning.label: ratios.pop(tuning.label) for tuning in tunings(strategy)}
    assert BEST_ON_CPU[strategy].label == min(of_deepspeed, key=of_deepspeed.__getitem__)
    if strategy == "zero1":
        assert min(ratios, key=ratios.__getitem__) == "zero redundancy, parameters as views"


def _race(
    strategy: str, num_ranks: int, modes: list[str], times: dict[str, list[float]], start: int = 0
) -> list[dict[str, Any]]:
    """A race of 4 sequences of 8 tokens a rank; all ranks take the same time but for the last, which is faster."""
    own: dict[str, Any] = {"race": f"{strategy} {num_ranks}x4", "start": start}
    size = {"global_size": 4 * num_ranks, "sequence_length": 8, "num_pairs": 3}
    rows: list[dict[str, Any]] = [
        {**own, "kind": "race", "modes": modes, "strategy": strategy, "num_ranks": num_ranks, **size}
    ]
    rows += [{**own, "kind": "warmup", "wall_s": {name: [9.0] * num_ranks for name in times}}]
    for values in zip(*times.values(), strict=True):
        wall_s = {name: [time] * (num_ranks - 1) + [0.9 * time] for name, time in zip(times, values, strict=True)}
        if num_ranks == 1:
            wall_s = {name: [time] for name, time in zip(times, values, strict=True)}
        rows.append({**own, "kind": "round", "wall_s": wall_s})
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


def _start(number: int, slowness: float) -> list[dict[str, Any]]:
    """One rank and four, on a machine that is slower in some starts than in others."""

    def times(**seconds: float) -> dict[str, list[float]]:
        return {name.replace("_", " "): [slowness * value] * 3 for name, value in seconds.items()}

    alone = _race("none", 1, ["weak"], times(plain=1.0, shardline=1.1), number)
    sharded = times(deepspeed=5.0, plain=4.0, shardline=2.0, extra_collectives=0.5, shardline_bucketed=4.4)
    return alone + _race("zero2", 4, ["weak"], sharded, number)


_ROWS = [
    _header(),
    {"kind": "plan", "races": ["none 1x4", "zero2 4x4"], "starts": [0, 1], "num_pairs": 3},
    *_start(0, 1.0),
    {
        "race": "zero2 4x4",
        "start": 0,
        "kind": "profile",
        "contestant": "shardline",
        **_PROFILE,
        "host": [0.1, 0.1],
        "communication_busy": [0.4, 0.4],
        "step_s": [2.5, 2.5],
    },
    {
        "race": "zero2 4x4",
        "start": 0,
        "kind": "losses",
        "contestant": "shardline",
        "largest_difference": 2e-7,
        "largest_norm_difference": 3e-6,
    },
    {
        "race": "zero2 4x4",
        "start": 0,
        "kind": "memory",
        "contestant": "shardline",
        "rest_bytes": 2 << 20,
        "peak_bytes": 3 << 20,
    },
    *_start(1, 1.5),
]


def test_rows_become_rates_efficiencies_and_ratios() -> None:
    one, four = read_races(_ROWS)
    assert four.contestants == ["plain", "shardline", "shardline bucketed", "deepspeed"]
    # 16 sequences of 8 tokens in 2 s and 3 s, the slower ranks'.
    assert four.tokens_per_s("shardline") == 128 / 2.5
    # 16 tokens/s and rank of the 32 that the plain loop has on one, in both starts: the second is slower for both.
    found = efficiency(four, "shardline", one)
    assert found is not None
    assert (found.value, found.low, found.high, *found.by_start) == pytest.approx((0.5,) * 5)
    plain, alone = efficiency(four, "plain", one), efficiency(one, "shardline", one)
    assert plain is not None
    assert alone is not None
    assert (plain.value, alone.value) == pytest.approx((0.25, 1 / 1.1))
    ratio, to_deepspeed = four.ratio("shardline"), four.ratio("shardline", "deepspeed")
    assert ratio is not None
    assert to_deepspeed is not None
    assert (ratio.value, ratio.high, to_deepspeed.value) == pytest.approx((0.5, 0.5, 0.4))
    assert four.ratio("plain") is None
    assert four.ratio("shardline", "fabric") is None
    to_sum = four.ratio_to_sum("shardline bucketed", ("plain", "extra collectives"))
    assert to_sum is not None
    assert to_sum.value == pytest.approx(4.4 / 4.5)
    assert four.profiles["shardline"]["communication"] == pytest.approx(0.25)
    assert four.norm_differences == {"shardline": 3e-6}


def test_a_start_that_was_interrupted_counts_only_where_none_is_whole() -> None:
    (_, four) = read_races(_ROWS[:-1])
    assert four.starts == [0]
    (_, broken) = read_races(_start(0, 1.0)[:-1])
    assert [len(times) for times in broken.times["plain"]] == [2]
    # Starts of one race alone, as --add-to makes them, are no experiment with the base's.
    added = [*_start(0, 1.0)[:5], *_start(1, 1.0)[5:]]
    one, four = read_races(added)
    assert efficiency(four, "shardline", one) is None
    assert "| n/a | n/a |" in markdown([_header(), *added], "raw.jsonl")


def test_the_table_says_what_was_measured_and_what_cannot_be() -> None:
    table = markdown(_ROWS, "raw.jsonl")
    assert "4 ranks of 1 threads share 2 cores, so that the most efficiency that is possible is 50% on 4." in table
    row = (
        "| 4 on 2 cores | shardline | 16 | 2500.0 | 51 | 13 | 50.0% | 50.0% to 50.0% | 0.500 | 0.500 to 0.500 | 0.0% |"
    )
    assert f"{row} 25.0% | 2e-07 | 3e-06 | 2.0 | 3.0 |" in table
    assert "| 4 on 2 cores | extra collectives | 16 | 625.0 |  |  |  |  | 0.125 |" in table
    assert "accelerate: on a CPU it trains DDP in silence" in table
    bucketed = "| zero2 4x4 | shardline bucketed |"
    assert f"{bucketed} plain | 1.100 | 1.100 to 1.100 |  |  | slower |" in table
    together = "plain and the extra collectives together"
    assert f"{bucketed} {together} | 0.978 | 0.978 to 0.978 | 1.00 | met | faster |" in table
    assert f"{bucketed} deepspeed | 0.880 | 0.880 to 0.880 | 1.00 | met | faster |" in table
    assert "| zero2 4x4 | shardline | deepspeed | 0.400 | 0.400 to 0.400 |  |  | faster |" in table
    assert "| none 1x4 | shardline | plain | 1.100 | 1.100 to 1.100 | 1.03 | missed | slower |" in table
    assert (
        "zero2 4x4: shardline is bound by compute: 55% of a step is matrix products and attention; 25% could be"
        in table
    )
    assert "2 starts of 3 pairs" in table
    assert "interrupted" not in table
    assert "1 to 2 starts (1 of the starts that were planned are missing: interrupted)" in markdown(
        _ROWS[:-1], "raw.jsonl"
    )
    once = markdown([_header(), *_start(0, 1.0)], "raw.jsonl")
    assert f"{bucketed} deepspeed | 0.880 | 0.880 to 0.880 | 1.00 | met | of one start |" in once
    drawn = ElementTree.fromstring(plot(_ROWS))
    assert "weak, zero2" in [element.text for element in drawn.iter("{http://www.w3.org/2000/svg}text")]
    # One rank alone, and nothing at all.
    assert ">weak, none<" in plot([_header(), *_start(0, 1.0)[:5]])
    assert "</svg>" in plot(_ROWS[:1])
    assert "0 starts" in markdown(_ROWS[:1], "raw.jsonl")


def test_a_change_is_judged_by_ratios_which_a_slower_machine_leaves_alone() -> None:
    def result(slowness: float, shardline: float, deepspeed: float) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        for start in range(5):
            steps = {"plain": 4.0, "shardline": shardline, "deepspeed": deepspeed}
            noise = {name: [slowness * value * (1 + 0.001 * start)] * 3 for name, value in steps.items()}
            rows += _race("zero2", 4, ["weak"], noise, start)
        return rows

    changes = ratio_changes(*(read_races(result(*values)) for values in ((1.4, 1.8, 5.0), (1.0, 2.0, 5.0))))
    found = {change.name: (round(change.ratio.value, 3), change.is_more_than_noise) for change in changes}
    assert found == {
        "zero2 4x4 shardline / plain": (0.9, True),
        "zero2 4x4 shardline / deepspeed": (0.9, True),
        "zero2 4x4 deepspeed / plain": (1.0, False),
    }


def test_starts_are_added_to_a_result_that_was_measured_alike_alone(tmp_path: Path) -> None:
    raw = tmp_path / "raw.jsonl"
    setup = {"size": "tiny", "threads": 1}
    header = _header(setup=setup)
    raw.write_text("\n".join(json.dumps(row) for row in [header, *_ROWS[1:]]) + "\n")
    assert first_start(raw, setup) == 2
    with pytest.raises(UserError, match="it was measured otherwise: threads 1, now 2; give the same options"):
        first_start(raw, setup | {"threads": 2})
    with pytest.raises(UserError, match="there is no result to add starts to"):
        first_start(tmp_path / "other.jsonl", setup)
    assert estimate(["a", "b", "c"], {"a": 100.0, "b": 200.0}) == "3 launches to come, about 8 minutes"
    assert "is known when the first" in estimate(["a"], {})


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--size", "huge"), "--size huge: there is no such size"),
        (("--size", "llama-1b"), "--size llama-1b needs a GPU"),
        (("--ranks", "0"), "--ranks 0: write numbers"),
        (("--strategies", "zero4"), "--strategies zero4: there is no zero4; there are ddp, zero1, zero2, zero3."),
        (("--contestants", 'plain,"fully_shard tuned, equal memory",nobody'), "there is no nobody; there are"),
        (("--contestants", "shardline"), "--contestants shardline: plain, which others are compared with, is missing"),
        (("--pairs", "0"), "--pairs 0: at least 12 steps of warm-up"),
        (("--starts", "0"), "--starts 0: at least 1 is needed"),
        (("--add-to", "none.jsonl"), "--add-to none.jsonl: there is no result to add starts to"),
        (("--allocation", "2"), "--allocation 2: write nodes x ranks of each"),
    ],
)
def test_bad_input_is_named(
    arguments: tuple[str, ...], complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--output", str(tmp_path / "out")]) == 2
    assert complaint in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_model_that_cannot_be_is_one_sentence(tmp_path: Path, shared_corpus: tuple[Path, Path]) -> None:
    finished = shardline(
        *("bench", "scaling", "--", "--size", "tiny", "--ranks", "1", "--modes", "weak", "--output", tmp_path),
        *(*_data(shared_corpus), "model.config.hidden_size=65"),
    )
    assert finished.returncode == 2
    (sentence,) = finished.stderr.splitlines()
    assert sentence.startswith("error: model.config is not accepted by llama: The hidden size (65) is not a multiple")


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
        assert set(race.loss_differences) == set(race.norm_differences) == set(race.contestants)
        assert max(race.loss_differences.values()) <= 1e-4
        assert max(race.norm_differences.values()) <= 1e-3
        assert set(race.profiles) == set(race.contestants)
        for profile in race.profiles.values():
            shares = {name: profile[name] for name in ("compute", "memory", "communication", "input", "host")}
            assert sum(shares.values()) == pytest.approx(1.0)
            assert min(shares["compute"], shares["memory"], shares["input"]) > 0
            assert profile["communication_busy"] >= shares["communication"]
            assert (profile["communication_busy"] > 0) is (race.num_ranks > 1)


_SHARDED = {
    *("plain", "shardline", "shardline bucketed", "fully_shard", "fully_shard tuned", "fabric", "deepspeed"),
}


_QUICK = ("plain", "shardline", "shardline bucketed", "fully_shard tuned", "deepspeed", "extra collectives")


@pytest.mark.timeout(400)
def test_a_strategy_is_measured_over_ranks(tmp_path: Path, shared_corpus: tuple[Path, Path]) -> None:
    options = (
        *("--size", "tiny", "--ranks", "1,2", "--modes", "weak", "--strategies", "zero2", "--pairs", 2, "--starts", 1),
        *("--contestants", ",".join(_QUICK)),
    )
    finished = shardline(
        *("bench", "scaling", "--", *options, "--output", tmp_path), *_data(shared_corpus), timeout_s=380
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    (raw,) = tmp_path.glob("*_2xcpu/scaling.jsonl")
    rows = [json.loads(line) for line in raw.read_text().splitlines()]
    assert rows[0]["kind"] == "header"
    assert rows[0]["packages"]["deepspeed"]
    alone, two = {"plain", "shardline"}, set(_QUICK)
    _check_races(rows, {"none 1x4": alone, "zero2 2x4": two})
    built = next(row["built"] for row in rows if row["kind"] == "settings" and row["race"] == "zero2 2x4")
    assert sorted(built) == sorted(two)
    assert "launches to come" in finished.stdout
    held = {row["contestant"]: row for row in rows if row["kind"] == "memory"}
    assert set(held) == two - {"extra collectives"}
    # Each rank has half of it.
    assert held["fully_shard tuned"]["rest_bytes"] < 0.6 * held["plain"]["rest_bytes"]
    assert all(row["rest_bytes"] < row["peak_bytes"] for row in held.values())
    assert raw.with_suffix(".md").read_text() in finished.stdout
    ElementTree.fromstring(raw.with_suffix(".svg").read_text())
    assert {path.suffix for path in raw.parent.iterdir()} == {".jsonl", ".md", ".svg", ".log"}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_strategy_is_measured_and_a_repeated_result_is_compared(
    tmp_path: Path, shared_corpus: tuple[Path, Path]
) -> None:
    expected = {
        "ddp 3x4": {"plain", "plain again", "shardline", "accelerate", "fabric", "transformers"},
        "zero1 3x4": {*_SHARDED, "zero redundancy"},
        "zero2 3x4": {*_SHARDED, "extra collectives"},
        "zero3 3x4": {*_SHARDED, "extra collectives", "fully_shard tuned, equal memory"},
    }
    for _ in range(2):
        finished = shardline(
            *("bench", "scaling", "--", "--size", "tiny", "--ranks", "3", "--modes", "weak", "--pairs", 4),
            *("--starts", 1, "--output", tmp_path),
            *_data(shared_corpus),
            timeout_s=440,
        )
        assert finished.returncode == 0, finished.stdout + finished.stderr
    (older,), (newer,) = (tmp_path.glob(f"*_3xcpu/{name}.jsonl") for name in ("scaling", "scaling-2"))
    _check_races([json.loads(line) for line in newer.read_text().splitlines()], expected)
    table = newer.with_suffix(".md").read_text()
    assert f"Since `{name_of(older)}`" in table
    # Of everyone over the plain loop, and of ours over each peer: 9, 17, 14 and 17.
    assert "of 57 rows differ by more than noise" in table
