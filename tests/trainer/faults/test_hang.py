"""Who was late, from recorded heartbeats, flight recorders and stacks."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.faults.test_deadlines import beat
from trainer.faults.hang.flight_recorder import Collective, flight_path, read_collectives
from trainer.faults.hang.heartbeat import HeartbeatFile, Pulse, RunningTime, heartbeat_path, read_heartbeats
from trainer.faults.hang.stacks import Frame, innermost, last_stack, stacks_path
from trainer.faults.hang.verdict import Traces, conclude_hang, judge, name_ranks, raise_alarm, read_verdict

STACKS = """Thread 0x00007f0000000002 (most recent call first):
  File "/usr/lib/python3.11/threading.py", line 327 in wait
  File "/home/user/shardline/trainer/faults/hang/watchdog.py", line 99 in _watch

Thread 0x00007f0000000001 (most recent call first):
  File "/venv/lib/python3.11/site-packages/torch/distributed/distributed_c10d.py", line 3000 in all_reduce
  File "/home/user/my_task.py", line 12 in make_batch
  File "/home/user/shardline/trainer/loop.py", line 7 in fit
"""
MAIN_THREAD = 0x7F0000000001


def waits(number: int, operation: str = "all_reduce", group: str = "gloo default_pg") -> list[Collective]:
    done = [Collective(group, one, "all_reduce", "float [4]", is_pending=False) for one in range(1, number)]
    return [*done, Collective(group, number, operation, "float [4]", is_pending=True)]


def done(number: int, group: str = "gloo default_pg") -> list[Collective]:
    return [Collective(group, number, "all_reduce", "float [4]", is_pending=False)]


def dumped(rank: int, collectives: list[Collective] | None, **changes: Any) -> Traces:
    return Traces(beat(rank, **({"state": "dumped", "in_phase_s": 12.0} | changes)), collectives)


@pytest.mark.parametrize(
    ("traces", "late", "said"),
    [
        # In no collective while the others are.
        ([dumped(0, waits(9)), dumped(1, done(8)), dumped(2, waits(9))], (1,), "ranks 0, 2 waited in all_reduce #9"),
        # It does not answer, whatever the others do.
        ([dumped(0, waits(9)), Traces(beat(1), silent_s=7.0, process="T (stopped)")], (1,), "state T (stopped)"),
        # All wait, one for an earlier one.
        ([dumped(0, waits(9)), dumped(1, waits(8))], (1,), "rank 1 on here stood still in phase train of step 5 in"),
        # Numbers of another group say nothing.
        ([dumped(0, waits(9, group="a")), dumped(1, waits(3, group="b"), step=4)], (1,), "rank 0 waited in"),
        # Nobody wrote collectives: step and phase tell.
        ([dumped(0, None, phase="agree"), dumped(1, None, phase="data")], (1,), "rank 0 was in phase agree"),
        ([dumped(0, None)], (0,), "rank 0 on here stood still in phase train of step 5, after 12.0 s"),
        # No evidence, no culprit.
        ([dumped(0, waits(9)), dumped(1, waits(9))], (), "no rank went on, and none of them was behind the others"),
        ([Traces(beat(0)), Traces(beat(1))], (), "none of them was behind"),
        (
            [dumped(0, waits(9)), dumped(1, waits(9, "all_gather")), dumped(2, waits(9))],
            (),
            "different collectives as #9 of gloo default_pg: ranks 0, 2 called all_reduce; rank 1 called all_gather.",
        ),
    ],
)
def test_verdict(traces: list[Traces], late: tuple[int, ...], said: str) -> None:
    hang = judge({one.heartbeat.rank: one for one in traces})
    assert hang.late == late
    assert said in hang.reason


def test_a_verdict_comes_from_files_and_stays(tmp_path: Path) -> None:
    entry = {
        "process_group": ["0", "default_pg"],
        "collective_seq_id": 9,
        "profiling_name": "gloo:all_reduce",
        "input_dtypes": ["Long"],
        "input_sizes": [[2]],
        "state": "scheduled",
        "is_p2p": False,
    }
    for rank, is_retired in ((0, False), (1, True)):
        file = HeartbeatFile(tmp_path, rank)
        file.write(beat(rank, state="dumped", main_thread=MAIN_THREAD, beat=1, in_phase_s=1234.5))
        # Shorter than what it replaces.
        file.write(beat(rank, state="dumped", main_thread=MAIN_THREAD, beat=2, in_phase_s=6.0, allowance_s=5.0))
        dump = {"gloo": {"entries": [entry | {"retired": is_retired}]}}
        flight_path(tmp_path, rank).write_text(json.dumps(dump))
        stacks_path(tmp_path, rank).write_text(STACKS)
    assert read_collectives(tmp_path, 0) == [Collective("gloo default_pg", 9, "all_reduce", "long [2]", True)]
    raise_alarm(tmp_path, beat(0), {})
    hang = conclude_hang(tmp_path, {})
    assert (hang.late, hang.step, hang.phase) == ((1,), 5, "train")
    assert hang.where == "user/my_task.py:12 in make_batch"
    assert hang.collective == "all_reduce #9 of gloo default_pg (long [2])"
    assert hang.reason == (
        "rank 1 on here stood still in phase train of step 5 at user/my_task.py:12 in make_batch, after 6.0 s there "
        "(deadline 5.0 s); rank 0 waited in all_reduce #9 of gloo default_pg (long [2])."
    )
    # A rank that comes to life changes nothing any more.
    HeartbeatFile(tmp_path, 1).write(beat(1, step=6))
    assert conclude_hang(tmp_path, {}) == hang == read_verdict(tmp_path)


def test_a_verdict_needs_no_disk(tmp_path: Path) -> None:
    HeartbeatFile(tmp_path, 0).write(beat(0, state="dumped"))
    # As on a full disk: nothing can be created. A name that is too long does that to root, too.
    for name in ("ALARM_NAME", "VERDICT_NAME"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(f"trainer.faults.hang.verdict.{name}", "x" * 300)
            raise_alarm(tmp_path, beat(0), {})
            assert conclude_hang(tmp_path, {}).late == (0,)


def test_a_heartbeat_that_stands_still_is_measured_on_our_own_clock(tmp_path: Path) -> None:
    running = RunningTime(100.0)
    pulse = Pulse(tmp_path, running)
    file = HeartbeatFile(tmp_path, 0)
    # Its machine's clock is years ahead.
    file.write(beat(0, beat=1, time=9e9))
    assert pulse.look(100.0)[0][1] == 0.0
    assert pulse.look(104.0)[0][1] == 4.0
    file.write(beat(0, beat=2, time=9e9))
    assert pulse.look(105.0)[0][1] == 0.0
    heartbeat_path(tmp_path, 1).write_text('{"rank": 1, "ho')
    assert list(read_heartbeats(tmp_path)) == [0]


def test_the_innermost_line_is_our_own_or_the_users_and_of_the_last_dump() -> None:
    lines = (STACKS.replace("line 12", "line 11") + STACKS).splitlines()
    frames = last_stack(lines, MAIN_THREAD)
    assert len(frames) == 3
    assert str(innermost(frames)) == "user/my_task.py:12 in make_batch"
    assert last_stack(lines, 5) == []
    crash = [
        "Fatal Python error: Segmentation fault",
        "",
        *STACKS.replace("Thread 0x00007f0000000001", "Current thread 0x01").splitlines(),
    ]
    assert str(innermost(last_stack(crash))) == "user/my_task.py:12 in make_batch"
    assert innermost([Frame("/x/site-packages/y.py", 1, "f")]) == Frame("/x/site-packages/y.py", 1, "f")


def test_names_of_ranks() -> None:
    assert name_ranks([3]) == "rank 3"
    assert name_ranks([5, 0, 1, 2]) == "ranks 0-2, 5"
