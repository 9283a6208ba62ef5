"""Ranks' ends as seen from outside, with real processes in the place of ranks."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from launcher.rank_exits import RankExits, RankFailure, root_cause
from tests.support import wait_until

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


def find(exits: RankExits, *ranks: int) -> None:
    """Look until these are seen: a process that was only just started may still have its parent's environment."""

    def all_are_found() -> bool:
        exits.wait(0.0)
        return set(ranks) <= exits.pids.keys()

    wait_until(all_are_found, what=f"ranks {ranks}")


def end(process: subprocess.Popen[bytes], exits: RankExits, rank: int | None = None) -> None:
    """Let a process end, and have a rank's end seen before this process, its parent, takes its status."""
    assert process.stdin is not None
    process.stdin.write(b"x")
    process.stdin.close()
    if rank is not None:

        def is_seen() -> bool:
            exits.wait(0.02)
            return rank in exits.ends

        wait_until(is_seen, what=f"the end of rank {rank}")
    process.wait()


@pytest.mark.timing
def test_the_first_to_fail_stays_the_first(exits: RankExits) -> None:
    programs = ["pass", "sys.exit(75)", "sys.exit(3)", "os.kill(os.getpid(), 9)"]
    ranks = [start(str(rank), program) for rank, program in enumerate(programs)]
    helper = start("", "sys.exit(1)")
    find(exits, 0, 1, 2, 3)
    end(helper, exits)
    end(ranks[0], exits, 0)
    end(ranks[1], exits, 1)
    # Ends that are no failure, and a child that is no rank.
    assert exits.first_failure is None
    end(ranks[2], exits, 2)
    assert exits.first_failure == RankFailure(2, 3)
    end(ranks[3], exits, 3)
    assert exits.first_failure == RankFailure(2, 3)


@pytest.mark.timing
def test_a_signal_is_a_negative_status(exits: RankExits) -> None:
    rank = start("5", "os.kill(os.getpid(), 11)")
    find(exits, 5)
    end(rank, exits, 5)
    assert exits.first_failure == RankFailure(5, -11)


@pytest.mark.timing
def test_what_happens_after_closing_is_not_noted(exits: RankExits) -> None:
    rank = start("0", "sys.exit(1)")
    find(exits, 0)
    exits.close()
    end(rank, exits)
    exits.wait(0.0)
    assert exits.first_failure is None


@pytest.mark.timing
def test_a_crash_is_the_cause_of_other_failures_at_the_same_time() -> None:
    lost, crashed, watchdog = RankFailure(0, 1), RankFailure(1, -11), RankFailure(2, -6)
    assert root_cause([lost, crashed]) == crashed
    assert root_cause([lost, watchdog]) == lost
