"""Processes end with whoever started them."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sharding.ranks.process_lifetime import is_started_by_launcher
from tests.support import ROOT, wait_until

pytestmark = pytest.mark.timeout(60)

CHILD = """
import sys, time
from sharding.ranks.process_lifetime import die_with_parent
{before}
die_with_parent()
print("up", flush=True)
time.sleep(60)
"""
PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE, text=True)
child.stdout.readline()
print(child.pid, flush=True)
time.sleep(60)
"""


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.timing
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_child_ends_with_its_parent(number: int) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, CHILD.format(before="")], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert is_running(child)
        parent.send_signal(number)
    wait_until(lambda: not is_running(child), timeout_s=5, what="the child's end")


@pytest.mark.timing
def test_a_launcher_that_is_gone_already_is_noticed() -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    finished = subprocess.run(
        [sys.executable, "-c", CHILD.format(before="")],
        cwd=ROOT,
        env=os.environ | {"SHARDLINE_LAUNCHER_PID": str(gone.pid)},
        capture_output=True,
        timeout=30,
        check=False,
    )
    assert finished.returncode == -signal.SIGKILL
    assert finished.stdout == b""


@pytest.mark.timing
def test_a_rank_started_by_hand_outlives_its_shell() -> None:
    assert is_started_by_launcher({"RANK": "0"})
    assert is_started_by_launcher({"ACCELERATE_DYNAMO_BACKEND": "NO"})
    assert not is_started_by_launcher({})
