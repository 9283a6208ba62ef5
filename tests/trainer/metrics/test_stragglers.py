"""Slow ranks: what is measured, how it is compared, when one is named."""

from pathlib import Path

import pytest

from tests.trainer.faults.test_deadlines import beat
from trainer.faults.hang.heartbeat import HeartbeatFile
from trainer.metrics.stragglers import BusyMeter, StragglerWatch, slowest_rank
from trainer.run_folder.events import read_events
from trainer.runtime.phases import Phase, Phases
from trainer.trackers.console import Console
from trainer.trackers.observers import Observers


@pytest.mark.parametrize(("strategy", "expected"), [("ddp", 2.0 + 4.0 + 8.0), ("zero2", 2.0 + 4.0)])
def test_a_ranks_own_time_ends_at_the_first_collective(strategy: str, expected: float) -> None:
    now = [100.0]
    phases = Phases(lambda: now[0])
    meter = BusyMeter(phases, strategy)  # type: ignore[arg-type]

    def passes(seconds: float) -> None:
        now[0] += seconds

    loss = meter.timed(passes)
    phases.enter(Phase.DATA, 1)
    passes(2.0)
    phases.enter(Phase.AGREE)
    passes(1.0)
    phases.enter(Phase.TRAIN)
    passes(4.0)
    loss(8.0)
    # The backward pass, and a second micro-batch.
    passes(16.0)
    loss(32.0)
    phases.enter(Phase.LOG)
    assert meter.take_s() == expected
    assert meter.take_s() == 0.0


@pytest.mark.parametrize(
    ("busy_s", "rank", "ratio"),
    [
        ([0.1], 0, 1.0),
        ([0.1, 0.1], 0, 1.0),
        # Of steps of 10 s, 5 s are this rank's.
        ([1.0, 6.0], 1, 2.0),
        ([1.0, 1.0, 6.0, 1.1], 2, 2.0),
        # Several times as much of next to nothing.
        ([0.001, 0.009], 1, 10.0 / 9.992),
    ],
)
def test_a_rank_is_compared_with_the_median_by_what_it_costs(busy_s: list[float], rank: int, ratio: float) -> None:
    assert slowest_rank(busy_s, 10.0) == (rank, pytest.approx(ratio))


def test_a_rank_is_named_once_after_three_intervals_and_again_when_it_becomes_slow_again() -> None:
    watch = StragglerWatch(1.5)
    assert [watch.see(1, 2.0) for _ in range(5)] == [False, False, True, False, False]
    assert not watch.see(1, 1.0)
    assert [watch.see(rank, 2.0) for rank in (1, 1, 0, 0, 0)] == [False, False, False, False, True]
    assert not any(StragglerWatch(0.0).see(1, 9.0) for _ in range(5))


def test_a_named_rank_is_an_event_with_its_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log_dir = tmp_path / "logs" / "attempt-2"
    log_dir.mkdir(parents=True)
    HeartbeatFile(log_dir, 1).write(beat(1, host="node12"))
    console = Console(total_steps=9)
    observers = Observers(tmp_path / "metrics.jsonl", console, attempt=2, stragglers=StragglerWatch(1.5))
    for step in range(1, 5):
        observers.log(step, {"throughput/slowest_rank": 1, "throughput/slowest_rank_ratio": 2.0})
    console.close()
    (event,) = read_events(tmp_path)
    assert {name: event[name] for name in ("kind", "attempt", "step", "rank", "host", "ratio")} == {
        "kind": "straggler",
        "attempt": 2,
        "step": 3,
        "rank": 1,
        "host": "node12",
        "ratio": 2.0,
    }
    assert "rank 1 on node12 is slow" in " ".join(capsys.readouterr().out.split())
