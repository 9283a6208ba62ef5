"""What a rank does that torchrun's agent has started again, before it imports torch."""

import json
import time
from pathlib import Path

import pytest

from trainer.config import load_config
from trainer.faults.failure.agent_restarts import await_restart
from trainer.faults.failure.record import FAILURE_NAME, Failure, FailureKind, set_failure_aside
from trainer.run_folder.events import read_events
from trainer.run_folder.folder import RunFolder


@pytest.fixture
def folder(config_file: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """The folder of a run whose first attempt has ended; this is rank 0 of the next."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "4")
    run_folder = RunFolder(load_config(config_file).run_dir)
    run_folder.log_dir(1).mkdir(parents=True)
    return run_folder


def _fail(folder: RunFolder, attempt: int, kind: FailureKind) -> None:
    set_failure_aside(folder.path)
    failure = Failure(kind=kind, signature=f"{kind} loop.py:1", attempt=attempt, step=7, rank=1, reason="it went wrong")
    (folder.path / FAILURE_NAME).write_text(failure.model_dump_json())
    folder.replace_outcome("failed", 1, 6, "it went wrong", 1)


@pytest.mark.parametrize(("exit_code", "status"), [(0, 0), (75, 0), (2, 2)])
def test_what_is_no_failure_is_not_tried_again(
    folder: RunFolder, config_file: Path, exit_code: int, status: int
) -> None:
    folder.write_outcome("ended", exit_code, 3, "reason")
    assert await_restart([str(config_file)], 1) == status
    assert read_events(folder.path) == []


@pytest.mark.timing
@pytest.mark.parametrize("rank", ["0", "1"])
def test_each_restart_waits_twice_as_long_and_is_an_event(
    folder: RunFolder, config_file: Path, rank: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", rank)
    _fail(folder, 1, FailureKind.KILLED)
    begun_at = time.monotonic()
    assert await_restart([str(config_file), "faults.restart_backoff_s=0.1"], 3) is None
    assert time.monotonic() - begun_at >= 0.4
    found = [(e["kind"], e["attempt"], e["step"], e["backoff_s"], e["num_left"]) for e in read_events(folder.path)]
    assert found == ([("restart", 1, 7, 0.4, 1)] if rank == "0" else [])


@pytest.mark.parametrize(("kind", "status"), [(FailureKind.EXCEPTION, 1), (FailureKind.KILLED, None)])
def test_the_same_failure_three_times_is_the_end(
    folder: RunFolder, config_file: Path, kind: FailureKind, status: int | None, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [str(config_file), "faults.restart_backoff_s=0"]
    for attempt in (1, 2):
        _fail(folder, attempt, kind)
        assert await_restart(settings, attempt) is None
    _fail(folder, 3, kind)
    # The agent may try on, and what it is told stays the same.
    assert [await_restart(settings, count) for count in (3, 4)] == [status, status]
    outcome = json.loads(folder.outcome_file.read_text())
    assert outcome["reason"].startswith("the same failure came 3 times in a row at step 7") == (status is not None)
    assert capsys.readouterr().err.count("3 times in a row") == (status is not None)


def test_a_run_that_diverged_is_not_tried_again(folder: RunFolder, config_file: Path) -> None:
    _fail(folder, 1, FailureKind.NONFINITE)
    assert await_restart([str(config_file)], 1) == 1


def test_a_wrong_configuration_is_the_ranks_own_to_report(tmp_path: Path) -> None:
    assert await_restart([str(tmp_path / "nothing.yaml")], 1) is None
