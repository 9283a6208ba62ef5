"""How long a phase may last, and when a rank that stays longer is a hang; all under a clock of our own."""

import pytest

from trainer.faults.hang.deadlines import Deadlines, is_hang
from trainer.faults.hang.heartbeat import Heartbeat, RunningTime
from trainer.runtime.phases import Phase, PhaseState


def beat(rank: int = 0, **changes: object) -> Heartbeat:
    values: dict[str, object] = {
        "rank": rank,
        "host": "here",
        "process_space": "space",
        "pid": 1,
        "main_thread": 1,
        "beat": 1,
        "time": 0.0,
        "phase": "train",
        "step": 5,
        "in_phase_s": 0.0,
        "allowance_s": 10.0,
        "peak_rss_gib": 1.0,
    }
    return Heartbeat.model_validate(values | changes)


def live(deadlines: Deadlines, *phases: tuple[Phase, float]) -> None:
    """Let phases pass, each for so many seconds."""
    at = 100.0
    for phase, seconds in phases:
        deadlines.listen(PhaseState(phase, 1, at), PhaseState(Phase.DATA, 1, at + seconds))
        at += seconds


def test_start_up_lasts_until_the_first_step_is_done_and_each_phase_learns_for_itself() -> None:
    deadlines = Deadlines(factor=10.0, min_s=3.0, startup_s=600.0)
    live(deadlines, (Phase.DATA, 50.0), (Phase.AGREE, 40.0))
    assert [deadlines.allowance_s(phase) for phase in Phase] == [600.0] * len(Phase)
    live(deadlines, (Phase.TRAIN, 1.0), (Phase.DATA, 0.1), (Phase.AGREE, 0.1))
    assert deadlines.allowance_s(Phase.TRAIN) == 10.0
    assert deadlines.allowance_s(Phase.DATA) == 3.0
    # Not seen yet.
    assert deadlines.allowance_s(Phase.LOG) == 600.0


def test_one_long_duration_counts_twice_until_it_is_forgotten_and_the_first_step_for_good() -> None:
    deadlines = Deadlines(factor=10.0, min_s=3.0, startup_s=600.0)
    live(deadlines, (Phase.TRAIN, 90.0), *[(Phase.TRAIN, 1.0)] * 70)
    # Compilation was in it, and may come again.
    assert deadlines.allowance_s(Phase.TRAIN) == 180.0
    live(deadlines, *[(Phase.DATA, 1.0)] * 40, (Phase.DATA, 30.0))
    assert deadlines.allowance_s(Phase.DATA) == 60.0
    live(deadlines, *[(Phase.DATA, 1.0)] * 64)
    assert deadlines.allowance_s(Phase.DATA) == 10.0


@pytest.mark.parametrize("phase", [Phase.SAVE, Phase.LOAD])
def test_storage_is_never_hurried(phase: Phase) -> None:
    deadlines = Deadlines(factor=10.0, min_s=3.0, startup_s=600.0)
    live(deadlines, (Phase.TRAIN, 1.0), (phase, 1.0))
    assert deadlines.allowance_s(phase) == 600.0
    live(deadlines, (phase, 400.0))
    assert deadlines.allowance_s(phase) == 2005.0


@pytest.mark.parametrize(
    ("own", "others", "expected"),
    [
        (beat(in_phase_s=9.9), [], False),
        (beat(in_phase_s=10.1), [], True),
        # Everybody is in the same place, and overdue here.
        (beat(in_phase_s=10.1), [(beat(1, in_phase_s=9.9), 0.5)], True),
        # Who is behind still has its time: it may be saving.
        (beat(in_phase_s=10.1, phase="agree"), [(beat(1, phase="data", in_phase_s=3.0), 0.5)], False),
        (
            beat(in_phase_s=10.1, phase="agree"),
            [(beat(1, phase="save", step=4, in_phase_s=30.0, allowance_s=600.0), 0.5)],
            False,
        ),
        # It has stood still for longer than it may.
        (beat(in_phase_s=10.1, phase="agree"), [(beat(1, phase="data", in_phase_s=3.0), 7.5)], True),
        # It cannot be there any more: this one has got past the agreement of step 5. It has said nothing since.
        (beat(in_phase_s=10.1), [(beat(1, phase="build", step=0, allowance_s=600.0), 9.0)], False),
        (beat(in_phase_s=10.1), [(beat(1, phase="build", step=0, allowance_s=600.0), 10.1)], True),
        # Who is ahead waits for this one.
        (beat(in_phase_s=10.1), [(beat(1, phase="log", in_phase_s=3.0), 0.5)], True),
        (beat(in_phase_s=10.1), [(beat(1, phase="data", state="ended"), 0.5)], True),
    ],
)
def test_who_sees_a_hang(own: Heartbeat, others: list[tuple[Heartbeat, float]], expected: bool) -> None:
    assert is_hang(own, others) == expected


def test_time_in_which_the_process_was_stopped_does_not_count() -> None:
    running = RunningTime(100.0)
    running.tick(100.5, 0.5)
    # A little late, as on a busy machine: that counts.
    running.tick(102.0, 0.5)
    assert running.since(100.0, 102.0) == 2.0
    # Stopped for an hour.
    running.tick(3702.5, 0.5)
    assert running.since(100.0, 3702.5) == pytest.approx(4.5)
    assert running.since(3702.5, 3703.0) == 0.5
    running.excuse(100.0, 3703.0)
    assert running.since(100.0, 3704.0) == pytest.approx(1.0)
