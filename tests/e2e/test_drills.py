"""Drills on a tiny run; and torchrun's own restart."""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from launcher.drills import catalogue
from launcher.drills.catalogue import DRILLS
from launcher.drills.outcome import Outcome
from launcher.drills.stage import Stage
from sharding.ranks.errors import UserError
from tests.support import ROOT, command_environment, from_zygote, shardline, training_curve
from trainer.faults.injection.inject import INJECT_VARIABLE
from trainer.run_folder.events import read_events

# The others are in `make soak`, where the command runs them all.
_OFTEN = ("kill", "hang", "disk-full")


@pytest.mark.timeout(900)
def test_drills_of_a_killed_and_a_hanging_rank_and_a_full_disk_pass(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalogue, "DRILLS", {name: DRILLS[name] for name in _OFTEN})
    with from_zygote():
        status = catalogue.run_drills("all", str(config_file), [], None, tmp_path / "drills")
    _all_hold(tmp_path / "drills", _OFTEN)
    assert status in (0, 1)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_drill_passes(config_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "drills"
    finished = shardline("drill", "all", config_file, "--folder", folder, timeout_s=1700)
    _all_hold(folder, tuple(DRILLS))
    assert finished.returncode in (0, 1), finished.stdout + finished.stderr


def _all_hold(folder: Path, names: Sequence[str]) -> None:
    outcomes = json.loads((folder / "drill.json").read_text())
    failed = [
        (outcome["name"], check["claim"], check["detail"])
        for outcome in outcomes
        for check in outcome["checks"]
        # What is timed may fail on a busy machine; the command says so, and this test does not time anything.
        if not check["holds"] and not check["is_timed"]
    ]
    assert failed == []
    assert [outcome["name"] for outcome in outcomes] == list(names)


def test_a_folder_of_somebody_else_is_left_alone(config_file: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    finished = shardline("drill", "kill", config_file, "--folder", mine)
    assert finished.returncode == 2
    assert "holds something else than an earlier drill; name another folder" in finished.stderr
    assert (mine / "thesis.txt").exists()


def test_a_drill_that_cannot_run_here_fails_and_the_others_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuses(_: Stage) -> Outcome:
        """Wants root."""
        raise UserError("only root may do that.")

    def runs(_: Stage) -> Outcome:
        """Wants nothing."""
        return Outcome("second")

    monkeypatch.setattr(catalogue, "DRILLS", {"first": refuses, "second": runs})
    assert catalogue.run_drills("all", "unused.yaml", [], None, tmp_path) == 1
    assert "1 of 2 drills passed; failed: first" in capsys.readouterr().out
    first, second = json.loads((tmp_path / "drill.json").read_text())
    assert (first["checks"][0]["detail"], second["passed"]) == ("only root may do that.", True)


def test_an_unknown_drill_is_told_of_the_others(config_file: Path) -> None:
    finished = shardline("drill", "earthquake", config_file)
    assert finished.returncode == 2
    assert "drill earthquake is not known; choose one of kill, term" in finished.stderr


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_torchrun_may_start_the_ranks_again_itself(make_config: Callable[..., Path], tmp_path: Path) -> None:
    runs = {}
    for name, faults in (("whole", []), ("killed", [{"fault": "kill", "rank": 1, "step": 4, "attempt": 1}])):
        config = make_config(name, checkpoint={"every_steps": 2})
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=2"]
        finished = subprocess.run(
            [*command, "-m", "trainer", str(config)],
            capture_output=True,
            text=True,
            timeout=180,
            cwd=ROOT,
            env=command_environment(**{INJECT_VARIABLE: json.dumps(faults)}),
            check=False,
        )
        assert finished.returncode == 0, finished.stderr
        runs[name] = tmp_path / "runs" / name
    assert training_curve(runs["killed"]) == training_curve(runs["whole"])
    assert [event["kind"] for event in read_events(runs["killed"])] == ["injected", "restart"]
    assert len(list((runs["killed"] / "logs").glob("attempt-*"))) == 2
