"""The goodput ledger: recorded phases under a clock of our own, over several attempts."""

import json
from collections.abc import Iterable
from pathlib import Path

import pytest

from trainer.metrics.goodput import (
    GOODPUT_NAME,
    AttemptLedger,
    Category,
    Goodput,
    Mark,
    read_goodput,
    spent_until,
    write_goodput,
)
from trainer.metrics.goodput_ledger import GoodputLedger, begin_ledger, begins_by_hand
from trainer.run_folder.events import record_event
from trainer.runtime.phases import Phase, Phases


class Attempt:
    """One attempt whose phases last as long as they are told to."""

    def __init__(
        self,
        run_dir: Path,
        number: int,
        began_at: float,
        startup_s: float,
        launches: bool = True,
        by_hand: bool = False,
    ) -> None:
        self.now = 1000.0 * number
        log_dir = run_dir / "logs" / f"attempt-{number}"
        log_dir.mkdir(parents=True, exist_ok=True)
        if launches:
            begin_ledger(log_dir, number, began_at, by_hand=by_hand)
        self.phases = Phases(lambda: self.now)
        # The launcher needed two seconds before the rank was there.
        self.ledger = GoodputLedger(run_dir, number, self.phases, lambda: began_at + 2.0, process_age_s=2.0)
        self.spend(startup_s - 2.0)

    def spend(self, seconds: float) -> None:
        self.now += seconds

    def enter(self, phase: Phase, step: int, seconds: float) -> None:
        """A phase begins, and lasts for so long."""
        self.phases.enter(phase, step)
        self.spend(seconds)

    def steps(self, numbers: Iterable[int], train_s: float = 2.0, first_s: float | None = None) -> None:
        """Each a quarter of a second of data, its training, and a quarter of logging."""
        for index, step in enumerate(numbers):
            self.enter(Phase.DATA, step, 0.25)
            self.enter(Phase.AGREE, step, 0.5)
            self.enter(Phase.TRAIN, step, (first_s if first_s is not None and index == 0 else train_s) - 0.5)
            self.enter(Phase.LOG, step, 0.25)

    def save(self, step: int, seconds: float = 1.0) -> None:
        self.enter(Phase.SAVE, step, seconds)

    def end(self, seconds: float = 0.0) -> None:
        self.ledger.finish()
        self.spend(seconds)
        self.ledger.write()


def read(run_dir: Path) -> Goodput:
    """The run's goodput, which adds up."""
    goodput = read_goodput(run_dir)
    assert goodput is not None
    assert sum(goodput.shares.values()) == pytest.approx(1.0, abs=1e-9)
    assert sum(goodput.seconds.values()) == pytest.approx(goodput.wall_s)
    for name in Category:
        assert sum(attempt.seconds[name] for attempt in goodput.attempts) == pytest.approx(goodput.seconds[name])
    return goodput


def in_seconds(goodput: Goodput) -> dict[str, float]:
    """What is not zero."""
    return {name: round(seconds, 6) for name, seconds in goodput.seconds.items() if abs(seconds) > 1e-9}


def test_one_attempt_is_divided_into_what_it_did(tmp_path: Path) -> None:
    attempt = Attempt(tmp_path, 1, began_at=5000.0, startup_s=10.0)
    attempt.steps([1, 2, 3, 4], first_s=7.0)
    attempt.enter(Phase.EVALUATE, 4, 3.0)
    attempt.enter(Phase.LOG, 4, 0.5)
    attempt.enter(Phase.COMPARE, 4, 0.125)
    attempt.save(4, 2.0)
    attempt.end(1.5)
    goodput = read(tmp_path)
    assert in_seconds(goodput) == {
        "startup": 10.0,
        "compile": 5.0,
        "training": 8.0,
        "data_wait": 1.0,
        "evaluation": 3.0,
        "checkpoint": 2.0,
        "logging": 1.5,
        "other": 1.625,
    }
    assert goodput.began_at == 5000.0
    assert goodput.wall_s == attempt.now - 1000.0 + 2.0
    assert goodput.goodput == goodput.shares["training"] == 8.0 / goodput.wall_s
    assert goodput.num_lost_steps == 0
    assert goodput.sentence() == (
        "goodput 24.9%: training 8 s of 32 s (start-up 31.1%, compile 15.6%, evaluation 9.3%, checkpoint stall 6.2%, "
        "other 5.1%, logging 4.7%, data wait 3.1%)"
    )
    written = write_goodput(tmp_path)
    assert written == goodput
    assert json.loads((tmp_path / GOODPUT_NAME).read_text()) == goodput.model_dump()


def test_what_took_no_time_to_speak_of_is_left_out_of_the_sentence(tmp_path: Path) -> None:
    attempt = Attempt(tmp_path, 1, began_at=0.0, startup_s=10.0)
    attempt.steps(list(range(1, 41)))
    attempt.enter(Phase.EVALUATE, 40, 0.5)
    attempt.end()
    goodput = read(tmp_path)
    assert 0 < goodput.shares["evaluation"] < 0.01
    assert goodput.sentence() == "goodput 72.4%: training 80 s of 110 s (start-up 9.0%, logging 9.0%, data wait 9.0%)"


def test_a_killed_attempt_loses_what_the_next_one_takes_again(tmp_path: Path) -> None:
    first = Attempt(tmp_path, 1, began_at=5000.0, startup_s=10.0)
    first.steps([1, 2], first_s=2.0)
    first.save(2)
    first.steps([3, 4])
    first.save(4)
    first.steps([5, 6])
    # It is in the middle of step 7 when its ledger is written for the last time.
    first.enter(Phase.DATA, 7, 0.25)
    first.enter(Phase.TRAIN, 7, 1.0)
    first.ledger.write()
    alone = read(tmp_path)
    assert "lost" not in in_seconds(alone)
    first_s = alone.wall_s
    # The newest checkpoint was corrupt: it begins after step 2.
    second = Attempt(tmp_path, 2, began_at=5000.0 + first_s + 30.0, startup_s=8.0)
    second.steps([3, 4, 5, 6, 7, 8])
    second.save(8)
    second.end()
    goodput = read(tmp_path)
    assert in_seconds(goodput) == {
        "startup": 18.0,
        "training": 2 * 2.0 + 6 * 2.0,
        "data_wait": 8 * 0.25,
        "logging": 8 * 0.25,
        "checkpoint": 2.0,
        # Steps 3 to 6, the second checkpoint and the unfinished step.
        "lost": 4 * 2.5 + 1.0 + 1.25,
        "down": 30.0,
    }
    assert [(one.began_after, one.last_step, one.num_lost_steps) for one in goodput.attempts] == [(0, 6, 4), (2, 8, 0)]


def test_an_attempt_that_begins_at_the_beginning_leaves_nothing_of_those_before(tmp_path: Path) -> None:
    first = Attempt(tmp_path, 1, began_at=0.0, startup_s=4.0)
    first.steps([1, 2, 3], first_s=6.0)
    first.end()
    # A start that came to nothing: no step, and so nothing lost.
    Attempt(tmp_path, 2, began_at=100.0, startup_s=5.0).end()
    third = Attempt(tmp_path, 3, began_at=200.0, startup_s=4.0)
    third.steps([1], first_s=5.0)
    third.end()
    goodput = read(tmp_path)
    spent = in_seconds(goodput)
    # The first step's excess is compiling, taken again or not; the third attempt's is told by the steps of the first.
    assert (spent["compile"], spent["lost"], spent["training"]) == (4.0 + 3.0, 3 * 2.0 + 3 * 0.5, 2.0)
    assert spent["startup"] == 4.0 + 5.0 + 4.0
    assert spent["down"] == pytest.approx(200.0 - (4.0 + 11.5) - 5.0)
    assert [one.num_lost_steps for one in goodput.attempts] == [3, 0, 0]


def test_going_back_within_an_attempt_and_then_further(tmp_path: Path) -> None:
    first = Attempt(tmp_path, 1, began_at=0.0, startup_s=4.0)
    first.steps([1, 2], first_s=2.0)
    first.save(2)
    first.steps([3, 4])
    first.save(4)
    first.steps([5])
    # Its samples are skipped, and the step is taken again.
    first.enter(Phase.DATA, 6, 0.25)
    first.enter(Phase.TRAIN, 6, 2.0)
    first.steps([6])
    # Back to the checkpoint after step 4.
    first.enter(Phase.LOAD, 6, 0.75)
    first.steps([5, 6])
    first.save(6)
    first.end()
    goodput = read(tmp_path)
    kept = {"startup": 4.0, "training": 12.0, "data_wait": 1.5, "logging": 1.5}
    lost_s = 2.25 + 2 * 2.5 + 0.75
    assert in_seconds(goodput) == kept | {"checkpoint": 3.0, "lost": lost_s}
    assert goodput.num_lost_steps == 1 + 2
    # The next attempt rolls back to before it began, after which the first keeps two steps and a checkpoint.
    second = Attempt(tmp_path, 2, began_at=1000.0, startup_s=4.0)
    second.steps([7, 8], first_s=3.0)
    second.enter(Phase.LOAD, 8, 1.0)
    second.steps([3, 4])
    second.end()
    goodput = read(tmp_path)
    spent = in_seconds(goodput)
    assert (spent["training"], spent["checkpoint"]) == (8.0, 1.0)
    assert spent["lost"] == pytest.approx(lost_s + 4 * 2.5 + 2.0 + 2 * 2.5 + 1.0)
    assert goodput.num_lost_steps == 3 + 4 + 2
    assert goodput.attempts[1].began_after == 2


def test_ranks_started_anew_within_an_attempt_are_counted_apart(tmp_path: Path) -> None:
    first = Attempt(tmp_path, 1, began_at=0.0, startup_s=4.0)
    first.steps([1, 2])
    first.end()
    again = Attempt(tmp_path, 1, began_at=50.0, startup_s=4.0, launches=False)
    again.steps([1, 2])
    again.end()
    goodput = read(tmp_path)
    assert [attempt.attempt for attempt in goodput.attempts] == [1, 1]
    assert in_seconds(goodput)["down"] == 50.0 - 9.0
    assert goodput.num_lost_steps == 2


def test_time_that_nobody_asked_the_run_for_is_no_down_time(tmp_path: Path) -> None:
    first = Attempt(tmp_path, 1, began_at=0.0, startup_s=4.0)
    first.steps([1, 2])
    first.save(2)
    first.end()
    # Over lunch, and then after a restart.
    second = Attempt(tmp_path, 2, began_at=3600.0, startup_s=4.0, by_hand=True)
    second.steps([3, 4])
    second.save(4)
    second.end()
    assert second.ledger.fraction() == read(tmp_path).goodput
    third = Attempt(tmp_path, 3, began_at=3600.0 + 10.0 + 30.0, startup_s=4.0)
    third.steps([5])
    third.end()
    goodput = read(tmp_path)
    assert (in_seconds(goodput)["down"], goodput.idle_s) == (30.0, 3590.0)
    assert goodput.wall_s == 10.0 + 10.0 + 30.0 + 6.5
    assert goodput.sentence().endswith("); 3,590 s between attempts do not count")


def test_who_begins_an_attempt(tmp_path: Path) -> None:
    assert begins_by_hand(tmp_path, 1, {})
    record_event(tmp_path, "restart", attempt=1, step=7)
    assert not begins_by_hand(tmp_path, 2, {})
    assert begins_by_hand(tmp_path, 3, {"SLURM_JOB_ID": "12", "SLURM_RESTART_COUNT": "0"})
    assert not begins_by_hand(tmp_path, 3, {"SLURM_JOB_ID": "12", "SLURM_RESTART_COUNT": "1"})
    assert not begins_by_hand(tmp_path, 3, {"SHARDLINE_IS_SUCCESSOR": "1"})


def test_writing_is_rare_and_a_very_long_run_stays_small(tmp_path: Path) -> None:
    attempt = Attempt(tmp_path, 1, began_at=0.0, startup_s=4.0)
    path = tmp_path / "logs" / "attempt-1" / GOODPUT_NAME
    written = set[int]()
    for step in range(1, 201):
        attempt.enter(Phase.DATA, step, 0.01)
        attempt.enter(Phase.TRAIN, step, 0.08)
        attempt.enter(Phase.LOG, step, 0.01)
        written.add(path.stat().st_mtime_ns)
    # 20 seconds of steps that are all logged.
    assert 15 <= len(written) <= 22
    for step in range(201, 801):
        attempt.steps([step])
        attempt.save(step)
    attempt.end()
    ledger = AttemptLedger.model_validate_json(path.read_bytes())
    assert len(ledger.marks) <= 256
    assert path.stat().st_size < 50_000
    # Between marks that were dropped, time is spread evenly: these steps all took the same.
    later = Attempt(tmp_path, 2, began_at=attempt.now, startup_s=4.0)
    later.steps([401])
    later.end()
    spent = read(tmp_path)
    assert spent.num_lost_steps == 400
    assert spent.seconds["lost"] == pytest.approx(400 * 3.5)


def test_a_corrupt_or_foreign_ledger_is_left_out(tmp_path: Path) -> None:
    assert read_goodput(tmp_path) is None
    assert write_goodput(tmp_path) is None
    assert not (tmp_path / GOODPUT_NAME).exists()
    Attempt(tmp_path, 1, began_at=0.0, startup_s=4.0).end()
    other = tmp_path / "logs" / "attempt-2" / GOODPUT_NAME
    other.parent.mkdir()
    other.write_text('{"format_version": 2}')
    assert in_seconds(read(tmp_path)) == {"startup": 4.0}


def test_the_fraction_so_far_is_that_of_all_attempts(tmp_path: Path) -> None:
    first = Attempt(tmp_path, 1, began_at=0.0, startup_s=4.0)
    first.steps([1, 2])
    first.save(2)
    first.end()
    second = Attempt(tmp_path, 2, began_at=20.0, startup_s=4.0)
    second.steps([3])
    assert second.ledger.fraction() == pytest.approx(6.0 / (20.0 + 4.0 + 2.5))
    assert second.ledger.sentence().startswith("goodput 22.6%: training 6 s of 26 s (")


def test_a_step_between_marks_is_estimated_and_one_beyond_them_is_kept() -> None:
    points = [Mark(step=0, loop_s=[0.0]), Mark(step=10, loop_s=[20.0]), Mark(step=12, loop_s=[30.0])]
    found = [spent_until(points, step)[0] for step in (0, 5, 10, 11, 12, 13)]
    assert found == [0.0, 10.0, 20.0, 25.0, 30.0, 30.0]
