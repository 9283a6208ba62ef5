"""The runs below a folder: how each is, by what lies in it."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sharding.ranks.errors import UserError
from trainer.attempt import begin_attempt
from trainer.commands.list_runs import main
from trainer.config import load_config
from trainer.config.rules import World
from trainer.metrics.best import record_directions
from trainer.metrics.file import MetricsFile
from trainer.report.run_list import list_runs, runs_text
from trainer.run_folder.folder import RunFolder
from trainer.run_folder.lease import Lease

MakeConfig = Callable[..., Path]


@pytest.fixture
def begun(make_config: MakeConfig) -> Callable[..., RunFolder]:
    """Begins the attempt of a run, as a launcher does, and logs some metrics."""

    def begin(name: str, lines: list[dict[str, Any]], **sections: Any) -> RunFolder:
        config = load_config(make_config(name, **sections))
        folder = RunFolder.of(config)
        begin_attempt(folder, config, World(2, has_gpu=False), [])
        file = MetricsFile(folder.metrics_file, last_step=0)
        for line in lines:
            file.write(line["step"], {key: value for key, value in line.items() if key != "step"})
        file.close()
        return folder

    return begin


def test_each_run_is_a_line(begun: Callable[..., RunFolder], capsys: pytest.CaptureFixture[str]) -> None:
    killed = begun("killed", [{"step": 1, "eval/loss": 4.0}, {"step": 2, "eval/loss": 5.0}, {"step": 3}])
    with killed.metrics_file.open("a") as file:
        file.write('{"step": 4, "eval/lo')
    finished = begun("finished", [{"step": 6, "eval/loss": None}])
    finished.write_outcome("finished", 0, 6, "all steps done")
    running = begun("running", [])
    lease = Lease.acquire(running.path)
    judged = begun("judged", [{"step": 2, "eval/f1": 0.5}, {"step": 4, "eval/f1": 0.25}], evaluation={"monitor": "f1"})
    judged.write_outcome("stopped", 75, 5, "asked")
    old = time.time() - 3 * 3600
    for path in finished.path.rglob("*"):
        os.utime(path, (old, old))
    root = killed.path.parent
    (root / "no-run").mkdir()
    (root / "no-run" / "config.yaml").write_text("{}")
    runs = list_runs(root)
    assert runs[-1].run == "finished"
    found = {run.run: run for run in runs}
    states = {name: (run.state, run.step, run.num_steps) for name, run in found.items()}
    assert states == {
        "killed": ("killed", 3, 6),
        "finished": ("finished", 6, 6),
        "running": ("running", 0, 6),
        "judged": ("stopped", 5, 6),
    }
    assert (found["killed"].evaluation.best, found["killed"].evaluation.best_step) == (4.0, 1)
    # Nobody has said which direction is better.
    assert (found["judged"].evaluation.best, found["judged"].evaluation.last) == (None, 0.25)
    record_directions(judged.path, {"f1": "higher"})
    lines = {line.split()[0]: line for line in runs_text(list_runs(root), root).splitlines()}
    assert "f1 0.5000 (2)" in lines["judged"]
    assert "3 h ago" in lines["finished"]
    assert all(len(line) <= 80 for line in lines.values())
    lease.release()
    assert [run.state for run in list_runs(running.path)] == ["killed"]
    assert main([str(root), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert {run["run"] for run in document["runs"]} == set(found)
    assert document["runs"][0]["evaluation"].keys() >= {"metric", "better", "best", "best_step", "last"}
    assert all(run["num_bytes"] > 100 for run in document["runs"])


def test_a_folder_without_runs_and_one_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert runs_text(list_runs(tmp_path), tmp_path) == f"no run in {tmp_path}"
    with pytest.raises(UserError, match="is no folder; name the one that runs are in"):
        list_runs(tmp_path / "nowhere")
    assert main([str(tmp_path / "nowhere"), "--json"]) == 2
    assert capsys.readouterr().out == ""


def test_what_another_release_has_left_is_listed(tmp_path: Path) -> None:
    run = tmp_path / "deep" / "er" / "run"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("a_setting_of: another release\n")
    (run / "metrics.jsonl").write_text('{"step": 3, "eval/loss": 2.5}\n')
    (listed,) = list_runs(tmp_path)
    assert (listed.run, listed.state, listed.step, listed.num_steps) == ("deep/er/run", "new", 3, None)
    assert listed.evaluation.best == 2.5
