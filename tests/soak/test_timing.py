"""Tests that sleep or have bounds in seconds, again and again beside two processes that leave no core idle."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from tests.support import ROOT

ROUNDS_VARIABLE = "SHARDLINE_TIMING_ROUNDS"
_NUM_BURNERS = 2


@contextmanager
def _burner() -> Iterator[None]:
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
@pytest.mark.timeout(6 * 3600)
def test_tests_with_bounds_in_seconds_pass_on_a_busy_machine() -> None:
    num_rounds = int(os.environ.get(ROUNDS_VARIABLE, "50"))
    command = [sys.executable, "-m", "pytest", "-q", "-m", "timing and not slow", "-p", "no:cacheprovider", "tests"]
    failed = []
    with ExitStack() as burners:
        for _ in range(_NUM_BURNERS):
            burners.enter_context(_burner())
        for number in range(1, num_rounds + 1):
            finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
            print(f"round {number}: {finished.stdout.strip().splitlines()[-1]}", flush=True)
            if finished.returncode:
                failed.append(finished.stdout[-6000:])
    assert not failed, f"{len(failed)} of {num_rounds} rounds failed:\n" + "\n".join(failed)
