"""Ranks' ends as seen from outside, with real processes in the place of ranks."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from launcher.rank_exits import RankExits, RankFailure, root_cause

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def exits() -> Iterator[RankExits]:
    watch = RankExits(os.getpid())
    yield watch
    watch.close()


def start(rank: str, program: str) -> subprocess.Popen[bytes]:
    """A child that runs a program when it is told to."""
    return subprocess.Popen(
        [sys.executable, "-c", f"import os, sys; sys.stdin.read(1); {program}"],
        env=os.environ | {"RANK": rank},
        stdin=subprocess.PIPE,
    )


def end(process: subprocess.Popen[bytes], exits: RankExits) -> None:
    assert process.stdin is not None
    process.stdin.write(b"x")
    process.stdin.close()
    # Long enough to see it, and before its parent, which is this process, takes its status.
    exits.wait(1.0)
    process.wait()


def test_the_first_to_fail_stays_the_first(exits: RankExits) -> None:
    programs = ["pass", "sys.exit(75)", "sys.exit(3)", "os.kill(os.getpid(), 9)"]
    ranks = [start(str(rank), program) for rank, program in enumerate(programs)]
    helper = start("", "sys.exit(1)")
    time.sleep(0.5)
    exits.wait(0.0)
    for process in (helper, ranks[0], ranks[1]):
        end(process, exits)
    # Ends that are no failure, and a child that is no rank.
    assert exits.first_failure is None
    end(ranks[2], exits)
    assert exits.first_failure == RankFailure(2, 3)
    end(ranks[3], exits)
    assert exits.first_failure == RankFailure(2, 3)


def test_a_signal_is_a_negative_status(exits: RankExits) -> None:
    rank = start("5", "os.kill(os.getpid(), 11)")
    time.sleep(0.5)
    exits.wait(0.0)
    end(rank, exits)
    assert exits.first_failure == RankFailure(5, -11)


def test_what_happens_after_closing_is_not_noted(exits: RankExits) -> None:
    rank = start("0", "sys.exit(1)")
    time.sleep(0.5)
    exits.wait(0.0)
    exits.close()
    end(rank, exits)
    assert exits.first_failure is None


def test_a_crash_is_the_cause_of_other_failures_at_the_same_time() -> None:
    lost, crashed, watchdog = RankFailure(0, 1), RankFailure(1, -11), RankFailure(2, -6)
    assert root_cause([lost, crashed]) == crashed
    assert root_cause([lost, watchdog]) == lost
