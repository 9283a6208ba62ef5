"""``shardline bench overhead``, the whole of it, at the tiny size; and contestants that do other work are found."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from benchmarks.overhead.__main__ import contest_config, main
from benchmarks.overhead.table import markdown, step_times
from sharding.ranks.errors import UserError
from sharding.ranks.process_group import Ranks
from tests.support import run_on_ranks, shardline

NAMES = {"plain", "plain again", "shardline", "accelerate", "fabric", "transformers"}


def _data(shared_corpus: tuple[Path, Path]) -> list[str]:
    corpus, cache = shared_corpus
    return [
        "data.source=text",
        f"data.paths=[{corpus}]",
        f"data.cache_dir={cache}",
        "data.vocab_size=301",
        "data.validation_fraction=0.2",
    ]


@pytest.mark.timeout(400)
def test_all_contestants_do_the_same_work_in_turn(tmp_path: Path, shared_corpus: tuple[Path, Path]) -> None:
    finished = shardline(
        *("bench", "overhead", "--", "--sizes", "tiny", "--starts", "2", "--pairs", "10", "--control"),
        *("--output", tmp_path),
        *_data(shared_corpus),
        timeout_s=380,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    (raw,) = tmp_path.glob("*_2xcpu/overhead.jsonl")
    rows = [json.loads(line) for line in raw.read_text().splitlines()]
    header, settings, again = rows[0], rows[1], [row for row in rows if row["kind"] == "settings"][1]
    assert header["hardware"]["cpu"]
    assert header["config"]["parallel"]["strategy"] == "ddp"
    assert header["packages"]["lightning-fabric"]
    assert set(settings["contestants"]) == set(again["contestants"]) == NAMES
    assert settings["built"] != again["built"]

    rounds = [row for row in rows if row["kind"] == "round"]
    assert [row["start"] for row in rounds] == [0] * 10 + [1] * 10
    assert len([row for row in rows if row["kind"] == "warmup"]) == 2 * 22
    for row in rounds:
        assert sorted(row["order"]) == sorted(NAMES)
        assert all(len(row["wall_s"][name]) == 2 and min(row["wall_s"][name]) > 0 for name in NAMES)
        assert all(min(row["cpu_s"][name]) > 0 for name in NAMES)
    assert len({tuple(row["order"]) for row in rounds}) > 1

    first, last = (
        {
            row["contestant"]: row
            for row in rows
            if row["kind"] == "losses" and row["start"] == 1 and row["at_end_of_warmup"] is early
        }
        for early in (True, False)
    )
    assert set(first) == set(last) == NAMES
    for name in NAMES:
        assert first[name]["largest_difference"] <= 1e-4
        assert {"10", "20"} <= set(first[name]["losses"])
        assert {"10", "20", "30"} <= set(last[name]["losses"])
        assert last[name]["losses"]["30"] < last[name]["losses"]["10"], "it learns"
    assert rows[-1]["exit_code"] == 0

    table = raw.with_suffix(".md").read_text()
    assert raw.with_suffix(".svg").exists()
    assert table in finished.stdout
    assert all(f"| {name} |" in table for name in NAMES)
    assert "2 starts of 10 pairs, after 22 rounds" in table
    assert {tuple(map(len, times)) for times in step_times(rows, "tiny").values()} == {(10, 10)}

    # An interrupted contest has a table of what it measured.
    half = markdown(rows[: rows.index(rounds[5])], raw.name)
    assert "1 start of 5 pairs (of 2 x 10 planned: interrupted)" in half
    assert "One start alone does not say who is faster." in half
    assert "1 start of 10 pairs (of 2 x 10" in markdown(rows[: rows.index(rounds[15])], raw.name)


def _contest_with_a_cheat(ranks: Ranks, values: dict[str, Any], folder: Path) -> None:
    """One contestant trains with another learning rate, one with gradients of twice the size, which Adam hides."""
    from benchmarks.contestants.contest import Contest
    from benchmarks.contestants.plain_loop import PlainLoop
    from benchmarks.contestants.race import Race, Rounds, build_contest, row_writer
    from trainer.config import parse_config

    class Cheat(PlainLoop):
        def __init__(self, contest: Contest) -> None:
            optimizer = contest.config.optimizer.model_copy(update={"lr": 2 * contest.config.optimizer.lr})
            super().__init__(replace(contest, config=contest.config.model_copy(update={"optimizer": optimizer})))

    class Doubled(PlainLoop):
        def _distribute(self, model: nn.Module) -> nn.Module:
            for parameter in model.parameters():
                parameter.register_hook(lambda gradient: 2 * gradient)
            return super()._distribute(model)

    config = parse_config(values, "test")
    rounds = Rounds(num_warmup=22, num_pairs=1)
    write = row_writer(str(folder / "raw.jsonl"), {"size": "tiny"}, ranks)
    for builders, complaint in (
        ({"plain": PlainLoop}, None),
        ({"plain": PlainLoop, "cheat": Cheat}, "cheat does other work than the plain loop: its loss of step 10"),
        ({"plain": PlainLoop, "doubled": Doubled}, "doubled does other .* its gradient norm of step 10"),
    ):
        contest = build_contest(config, ranks, rounds.num_steps, folder)
        race = Race(contest, builders, rounds, threads=1, title="tiny", write=write)
        if complaint is None:
            race.run()
        else:
            with pytest.raises(RuntimeError, match=complaint):
                race.run()


@pytest.mark.timeout(200)
def test_other_work_ends_the_contest(tmp_path: Path, shared_corpus: tuple[Path, Path]) -> None:
    config = contest_config("tiny", 1, _data(shared_corpus))
    assert config.parallel.strategy == "none"
    run_on_ranks(_contest_with_a_cheat, 1, config.model_dump(mode="json", by_alias=True), tmp_path, timeout_s=180)
    rows = [json.loads(line) for line in (tmp_path / "raw.jsonl").read_text().splitlines()]
    found = {row["contestant"]: row for row in rows if row["kind"] == "losses" and row["contestant"] != "plain"}
    assert found["cheat"]["largest_difference"] > 1e-4
    assert found["doubled"]["largest_norm_difference"] == pytest.approx(1.0, rel=0.01)
    assert found["doubled"]["largest_difference"] <= 1e-4, "of the loss nobody would see it"


@pytest.mark.parametrize(("size", "per_rank"), [("tiny", 4), ("quickstart", 8)])
def test_batch_grows_with_the_ranks(size: str, per_rank: int) -> None:
    for num_ranks in (1, 2, 8):
        config = contest_config(size, num_ranks, [])
        assert config.batch.global_size == per_rank * num_ranks
        assert config.parallel.strategy == ("none" if num_ranks == 1 else "ddp")
    assert contest_config(size, 2, ["batch.global_size=24", "batch.micro_size=3"]).batch.global_size == 24
    with pytest.raises(UserError, match=r"batch\.global_size=24"):
        contest_config(size, 5, ["batch.global_size=24"])
    with pytest.raises(UserError, match=r"parallel\.strategy=zero2: shardline bench overhead races under ddp"):
        contest_config(size, 2, ["parallel.strategy=zero2"])
    with pytest.raises(UserError, match=r"task\.loss_chunk_tokens=64: of the contestants of a race Shardline alone"):
        contest_config(size, 2, ["task.loss_chunk_tokens=64"])


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--sizes", "huge"), "--sizes huge: there is no size huge; there are tiny, quickstart."),
        (("--warmup", "3"), "--warmup 3 --pairs 60: at least 22 steps of warm-up"),
        (("--starts", "0"), "--starts 0: at least 1 is needed"),
        (("optimizer.rate=1",), "optimizer.rate"),
    ],
)
def test_bad_input_is_named(
    arguments: tuple[str, ...], complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--output", str(tmp_path / "out")]) == 2
    assert complaint in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
