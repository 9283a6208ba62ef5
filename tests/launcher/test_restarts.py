"""When a failed attempt is followed by another."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from launcher.restarts import Restarts
from launcher.stop_signals import StopSignals
from trainer.config.faults import FaultsConfig
from trainer.faults.failure.record import FAILURE_NAME, Failure, FailureKind, set_failure_aside
from trainer.faults.failure.restart_policy import num_restarts_that_count
from trainer.metrics.goodput import GOODPUT_NAME, AttemptLedger
from trainer.run_folder.events import read_events
from trainer.run_folder.folder import RunFolder


def _restarts(folder: Path, *, max_restarts: int, backoff_s: float = 0.0) -> Restarts:
    return Restarts(FaultsConfig(max_restarts=max_restarts, restart_backoff_s=backoff_s), RunFolder(folder))


def _fail(folder: Path, attempt: int, kind: FailureKind, step: int = 7, where: str = "loop.py:1") -> None:
    # As the beginning of an attempt does.
    set_failure_aside(folder)
    failure = Failure(
        kind=kind, signature=f"{kind} {where}", attempt=attempt, step=step, rank=1, reason="it went wrong"
    )
    (folder / FAILURE_NAME).write_text(failure.model_dump_json())


def test_no_restart_unless_asked_for(tmp_path: Path) -> None:
    _fail(tmp_path, 1, FailureKind.KILLED)
    assert _restarts(tmp_path, max_restarts=0).after(1, 1, StopSignals()) == 1
    assert read_events(tmp_path) == []


@pytest.mark.parametrize(("exit_code", "kind"), [(0, None), (75, None), (2, FailureKind.BAD_INPUT), (130, None)])
def test_an_end_that_is_no_failure_is_the_end(tmp_path: Path, exit_code: int, kind: FailureKind | None) -> None:
    if kind is not None:
        _fail(tmp_path, 1, kind)
    assert _restarts(tmp_path, max_restarts=3).after(1, exit_code, StopSignals()) == exit_code


def test_nothing_is_tried_again_that_cannot_go_otherwise(tmp_path: Path) -> None:
    _fail(tmp_path, 1, FailureKind.NONFINITE)
    assert _restarts(tmp_path, max_restarts=3).after(1, 1, StopSignals()) == 1


def test_restarts_are_bounded_and_each_waits_longer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    restarts = _restarts(tmp_path, max_restarts=2, backoff_s=0.1)
    for attempt in (1, 2, 3):
        _fail(tmp_path, attempt, FailureKind.KILLED)
        assert restarts.after(attempt, 1, StopSignals()) == (None if attempt < 3 else 1)
    events = read_events(tmp_path)
    assert [(event["kind"], event["attempt"], event["backoff_s"], event["num_left"]) for event in events] == [
        ("restart", 1, 0.1, 1),
        ("restart", 2, 0.2, 0),
    ]
    assert "2 restarts were all" in capsys.readouterr().err


def _take_steps(folder: Path, attempt: int, began_after: int, last_step: int) -> None:
    ledger = AttemptLedger(attempt=attempt, began_at=0.0, began_after=began_after, last_step=last_step)
    path = folder / "logs" / f"attempt-{attempt}" / GOODPUT_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(ledger.model_dump_json())


def test_restarts_are_there_again_after_enough_progress(tmp_path: Path) -> None:
    settings = FaultsConfig(max_restarts=2, restart_backoff_s=0.01, restart_refill_steps=100)
    # A job of Slurm counts them itself, and makes a new one of these each time.
    for number, (began_after, last_step, counted) in enumerate(
        # The fourth has taken 100 steps that none before it had; the sixth again, from an older checkpoint.
        [(0, 50, 0), (40, 60, 1), (60, 155, None), (40, 255, 0), (250, 300, 1), (200, 400, 0), (300, 450, 1)],
        start=1,
    ):
        _take_steps(tmp_path, number, began_after, last_step)
        _fail(tmp_path, number, FailureKind.KILLED, step=last_step)
        ended = Restarts(settings, RunFolder(tmp_path), number - 1).after(number, 1, StopSignals())
        assert ended == (1 if counted is None else None), number
        if counted is not None:
            event = read_events(tmp_path)[-1]
            assert (event["attempt"], event["num_left"]) == (number, 1 - counted)
            assert event["backoff_s"] == 0.01 * 2**counted


def test_falling_back_to_the_same_checkpoint_is_no_progress(tmp_path: Path) -> None:
    settings = FaultsConfig(max_restarts=2, restart_backoff_s=0.0, restart_refill_steps=100)
    restarts = Restarts(settings, RunFolder(tmp_path))
    found = []
    for attempt in (1, 2, 3, 4):
        _take_steps(tmp_path, attempt, 0, 500 + attempt)
        _fail(tmp_path, attempt, FailureKind.KILLED)
        found.append(restarts.after(attempt, 1, StopSignals()))
        if found[-1] is not None:
            break
    assert found == [None, None, 1]
    assert num_restarts_that_count(RunFolder(tmp_path), 3, 2, 0) == 2


def test_the_same_failure_three_times_in_a_row_is_the_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    restarts = _restarts(tmp_path, max_restarts=9)
    # Another step, and it is another failure.
    for attempt, step in enumerate((7, 7, 8, 8), start=1):
        _fail(tmp_path, attempt, FailureKind.EXCEPTION, step)
        assert restarts.after(attempt, 1, StopSignals()) is None
    _fail(tmp_path, 5, FailureKind.EXCEPTION, 8)
    assert restarts.after(5, 1, StopSignals()) == 1
    outcome = json.loads((tmp_path / "outcome.json").read_text())
    assert outcome["reason"].startswith("the same failure came 3 times in a row at step 8: it went wrong; mend it")
    assert outcome["reason"] in capsys.readouterr().err


def test_failures_of_an_earlier_command_count_too(tmp_path: Path) -> None:
    for attempt in (1, 2):
        _fail(tmp_path, attempt, FailureKind.EXCEPTION)
    _fail(tmp_path, 3, FailureKind.EXCEPTION)
    assert _restarts(tmp_path, max_restarts=9).after(3, 1, StopSignals()) == 1
    # The fourth attempt left no report: it was stopped, or its launcher was killed.
    _fail(tmp_path, 5, FailureKind.EXCEPTION)
    assert _restarts(tmp_path, max_restarts=9).after(5, 1, StopSignals()) is None


def test_kills_from_outside_do_not_count(tmp_path: Path) -> None:
    restarts = _restarts(tmp_path, max_restarts=9)
    for attempt in range(1, 7):
        _fail(tmp_path, attempt, FailureKind.KILLED if attempt % 3 == 0 else FailureKind.EXCEPTION)
        assert restarts.after(attempt, 1, StopSignals()) is None


@pytest.mark.timing
@pytest.mark.parametrize("by_file", [False, True])
def test_a_stop_while_waiting_ends_the_run_as_stopped(tmp_path: Path, by_file: bool) -> None:
    _fail(tmp_path, 1, FailureKind.HANG)

    def stop() -> None:
        time.sleep(0.3)
        (tmp_path / "stop").touch() if by_file else os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop).start()
    begun_at = time.monotonic()
    with StopSignals() as signals:
        assert _restarts(tmp_path, max_restarts=1, backoff_s=60.0).after(1, 1, signals) == 75
    assert time.monotonic() - begun_at < 30
    assert json.loads((tmp_path / "outcome.json").read_text())["status"] == "stopped"


def test_a_signal_that_came_while_the_attempt_was_concluded_counts(tmp_path: Path) -> None:
    _fail(tmp_path, 1, FailureKind.HANG)
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert _restarts(tmp_path, max_restarts=1).after(1, 1, signals) == 75
