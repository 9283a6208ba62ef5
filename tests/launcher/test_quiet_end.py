"""Commands that are interrupted, or whose output is no longer read, end without a traceback."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT, command_environment, wait_until

pytestmark = pytest.mark.timeout(60)

LAUNCHER = [sys.executable, "-m", "launcher"]


def hear_interrupts() -> None:
    """Whoever starts the tests in the background of a script has them, and all below them, ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start(command: list[str], **extra: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        preexec_fn=hear_interrupts,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=command_environment(**extra),
    )


def read_only(num_lines: int, command: list[str]) -> tuple[int, str]:
    """As ``command | head -n NUM``."""
    with start(command) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        for _ in range(num_lines):
            process.stdout.readline()
        process.stdout.close()
        said = process.stderr.read()
    return process.returncode, said


# More than a pipe holds, and less than what is written at once.
@pytest.mark.timing
@pytest.mark.parametrize("num_lines", [2, 100_000])
def test_a_reader_that_goes_is_no_fault(num_lines: int) -> None:
    program = f"""
import time
from sharding.ranks.errors import ends_with_a_sentence
@ends_with_a_sentence
def main():
    print("first", flush=True)
    time.sleep(0.5)
    for number in range({num_lines}):
        print(number)
    return 0
raise SystemExit(main())
"""
    assert read_only(1, [sys.executable, "-c", program]) == (141, "")


def test_another_broken_pipe_is_one() -> None:
    program = """
from sharding.ranks.quiet_end import ends_quietly
with ends_quietly():
    raise BrokenPipeError("a socket of ours")
"""
    status, said = read_only(1, [sys.executable, "-c", program])
    assert status == 1
    assert "a socket of ours" in said


def test_a_reader_that_goes_while_rich_prints() -> None:
    # As data show does; rich has a status of its own for it.
    program = """
from rich.console import Console
from sharding.ranks.errors import ends_with_a_sentence
@ends_with_a_sentence
def main():
    console = Console()
    for number in range(100_000):
        console.print(number)
    return 0
raise SystemExit(main())
"""
    assert read_only(1, [sys.executable, "-c", program]) == (141, "")


def test_a_command_that_nobody_reads() -> None:
    # Before it prints anything; else a pipe may hold all of it.
    assert read_only(0, [*LAUNCHER, "tracking", "dashboard"]) == (141, "")


@pytest.mark.parametrize("arguments", [("bench", "data"), ("export", "RUN", "--to", "out"), ("doctor",)], ids=" ".join)
def test_ctrl_c_is_one_line(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    # Stands for libraries that take seconds to load.
    reached = tmp_path / "reached.txt"
    (tmp_path / "slow").mkdir()
    for name in ("torch", "datasets", "transformers"):
        slow = f"import time, pathlib\npathlib.Path({str(reached)!r}).touch()\ntime.sleep(30)\n"
        (tmp_path / "slow" / f"{name}.py").write_text(slow)
    command = [*LAUNCHER, *(str(tmp_path) if argument == "RUN" else argument for argument in arguments)]
    with start(command, PYTHONPATH=os.pathsep.join([str(ROOT), str(tmp_path / "slow")])) as process:
        wait_until(reached.exists, what="the import of a slow library")
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)
    assert (process.returncode, said) == (130, "error: interrupted\n")
