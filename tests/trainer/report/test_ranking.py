"""Several runs in order of what they are judged by, and what sets them apart."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.report.test_report import make_run
from trainer.commands.report import main
from trainer.metrics.best import DIRECTIONS_NAME, best_point, better_direction, read_directions, record_directions
from trainer.report.page import write_report
from trainer.report.ranking import rank_runs
from trainer.report.run_data import read_runs

_CONFIG = (
    "name: {name}\noptimizer: {{lr: {lr}}}\nevaluation: {{monitor: {monitor}}}\ntracking: {{wandb: {{mode: {name}}}}}\n"
)


def _run(folder: Path, values: list[float | None], *, lr: float = 0.1, monitor: str = "loss", more: str = "") -> Path:
    lines: list[dict[str, Any]] = [{"step": 1, "throughput/tokens_per_s": 10.0}]
    lines += [{"step": step, f"eval/{monitor}": value} for step, value in enumerate(values, 2)]
    lines.append({"step": 9, "throughput/tokens_per_s": 30.0})
    run = make_run(folder, lines, _CONFIG.format(name=folder.name, lr=lr, monitor=monitor) + more)
    (run / "outcome.json").write_text('{"status": "finished", "exit_code": 0, "step": 9, "reason": "all steps done"}')
    return run


def test_the_lowest_loss_is_first_and_only_what_changes_training_is_said_to_differ(tmp_path: Path) -> None:
    runs = [_run(tmp_path / "a", [3.0, 2.5, 2.75]), _run(tmp_path / "b", [2.0, 2.25], lr=0.2), _run(tmp_path / "c", [])]
    ranking = rank_runs(read_runs(runs))
    assert [(run.rank, run.label, run.judged.best, run.judged.best_step) for run in ranking.runs] == [
        (1, "b", 2.0, 2),
        (2, "a", 2.5, 3),
        (None, "c", None, None),
    ]
    assert [run.settings for run in ranking.runs] == [{"optimizer.lr": "0.2"}] + [{"optimizer.lr": "0.1"}] * 2
    assert {run.tokens_per_s for run in ranking.runs} == {20.0}
    assert ranking.notes == ["runs without an evaluation have no place"]
    wide = ranking.text(narrow=False).splitlines()
    assert wide[0].split("  ")[-1] == "settings that differ"
    assert wide[1].split() == ["1", "b", "finished", "2.0000", "2", "20", "optimizer.lr=0.2"]


def test_a_metric_of_which_more_is_better_is_ranked_the_other_way(tmp_path: Path) -> None:
    runs = [_run(tmp_path / name, values, monitor="accuracy") for name, values in (("a", [0.5]), ("b", [0.6, 0.4]))]
    ranking = rank_runs(read_runs(runs))
    assert [run.rank for run in ranking.runs] == [None, None]
    assert "which direction of accuracy is better was not recorded" in ranking.notes[0]
    for run in runs:
        record_directions(run, {"loss": "lower", "accuracy": "higher"})
    ranking = rank_runs(read_runs(runs))
    assert [(run.rank, run.label, run.judged.best, run.judged.last) for run in ranking.runs] == [
        (1, "b", 0.6, 0.4),
        (2, "a", 0.5, 0.5),
    ]
    assert ranking.title == "best accuracy (higher)"
    (headline,) = [one for one in read_runs(runs)[1].headlines() if one.title == "Best evaluation accuracy"]
    assert (headline.value, headline.note) == ("0.6000", "step 2, higher is better")


def test_what_cannot_be_compared_is_said(tmp_path: Path) -> None:
    mixed = [_run(tmp_path / "a", [1.0]), _run(tmp_path / "b", [0.5], monitor="f1")]
    assert "judged by different metrics (f1, loss)" in rank_runs(read_runs(mixed)).notes[0]
    other = [_run(tmp_path / name, [1.0], more=f"data: {{sequence_length: {n}}}\n") for name, n in (("c", 8), ("d", 9))]
    ranking = rank_runs(read_runs(other))
    assert ranking.notes == [
        "the runs differ in data.sequence_length: they may have been evaluated on other samples",
    ]
    assert [run.rank for run in ranking.runs] == [1, 2]


def test_the_page_opens_with_the_table_and_the_terminal_shows_it_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [_run(tmp_path / "a", [3.0]), _run(tmp_path / "b", [2.0], lr=0.2)]
    page = tmp_path / "page.html"
    assert main([*map(str, runs), "--to", str(page)]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in shown[1:3]] == ["b", "a"]
    assert shown[-1] == str(page)
    text = page.read_text()
    assert 0 < text.index('id="ranking"') < text.index('<section class="runs')
    assert text.index("optimizer.lr=0.2") < text.index("optimizer.lr=0.1")
    assert main([*map(str, runs), "--to", str(page), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [(run["label"], run["judged"]["better"]) for run in document["runs"]] == [("b", "lower"), ("a", "lower")]
    write_report(runs[:1], page)
    assert 'id="ranking"' not in page.read_text()


def test_of_many_settings_that_differ_the_rest_unfolds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def config(value: int) -> str:
        sizes = "".join(f", size_{index}: {value}" for index in range(30))
        return f"model: {{config: {{depth: {value}{sizes}}}}}\ndata: {{a: 1, sequence_length: {value}}}\n"

    runs = [_run(tmp_path / name, [1.0], more=config(value)) for value, name in enumerate("ab")]
    page = tmp_path / "page.html"
    for is_wide in (True, False):
        text = rank_runs(read_runs(runs)).text(narrow=not is_wide)
        assert text.count("model.config.size_") == 2 * 7
        assert text.count("and 24 more") == 2
    assert main([*map(str, runs), "--to", str(page)]) == 0
    written = page.read_text()
    ranking = written[written.index('id="ranking"') : written.index('<section class="runs')]
    assert ranking.count("<summary>and 24 more</summary>") == 2
    assert ranking.count("<div>model.config.size_29=1</div>") == 1
    capsys.readouterr()
    assert main([*map(str, runs), "--to", str(page), "--json"]) == 0
    assert all(len(run["settings"]) == 32 for run in json.loads(capsys.readouterr().out)["runs"])


def test_directions_are_kept_with_the_run(tmp_path: Path) -> None:
    record_directions(tmp_path, {"loss": "lower", "books/f1": "higher"})
    record_directions(tmp_path, {"loss": "lower"})
    assert read_directions(tmp_path) == {"loss": "lower", "books/f1": "higher"}
    assert better_direction(tmp_path, "ema_books/f1") == "higher"
    assert better_direction(tmp_path, "books/loss") == "lower"
    assert better_direction(tmp_path, "accuracy") is None
    (tmp_path / DIRECTIONS_NAME).write_text("[")
    assert read_directions(tmp_path) == {}
    record_directions(tmp_path / "nowhere", {"loss": "lower"})
    assert best_point([(1, 2.0), (2, 1.0), (3, 1.0)], "lower") == (2, 1.0)
    assert best_point([(1, 2.0), (2, 1.0), (3, 2.0)], "higher") == (1, 2.0)
    assert best_point([(1, 2.0)], None) is None
