"""Processes that tests take from a zygote are as processes that are started: family, name, streams, signals, end."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import ROOT, command_environment, from_zygote, wait_until

pytestmark = pytest.mark.timeout(400)

_STARTED = [sys.executable, "-u", "-m", "tests.zygote_subject"]


@pytest.fixture(params=["clone", "start"])
def start(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that says what it sees of itself, and then does as it is told: a clone, and for comparison a start."""
    environment = command_environment(SUBJECT="one", PYTHONPATH=f"{ROOT}{os.pathsep}{tmp_path}")
    options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    # What a shell has its jobs in the background ignore is not what is looked at here.
    wanted = {signal.SIGUSR2: signal.SIG_IGN, signal.SIGINT: signal.default_int_handler, signal.SIGQUIT: signal.SIG_DFL}
    old = {number: signal.signal(number, handler) for number, handler in wanted.items()}
    command = [*_STARTED, "a b", str(request.param == "clone")]
    try:
        if request.param == "clone":
            with from_zygote():
                process = subprocess.Popen(command, cwd=tmp_path, env=environment, text=True, **options)
        else:
            process = subprocess.Popen(command, cwd=tmp_path, env=environment, text=True, **options)
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
    with process:
        yield process
        process.kill()


def _facts(process: subprocess.Popen[str]) -> dict[str, str]:
    assert process.stdout is not None
    lines = iter(process.stdout.readline, "end\n")
    return dict(line.rstrip("\n").split("=", 1) for line in lines)


def _tell(process: subprocess.Popen[str], order: str) -> None:
    assert process.stdin is not None
    process.stdin.write(order + "\n")
    process.stdin.flush()


def test_it_is_a_child_with_its_own_name_and_environment(start: subprocess.Popen[str], tmp_path: Path) -> None:
    facts = _facts(start)
    assert facts["is_clone"] == facts["argument"]
    assert (int(facts["pid"]), int(facts["parent"]), facts["folder"]) == (start.pid, os.getpid(), str(tmp_path))
    assert facts["tid"] == facts["pid"]
    assert (facts["SUBJECT"], facts["first"], facts["name"]) == ("one", "a b", "__main__")
    assert facts["path"] == str([str(tmp_path), str(ROOT), str(tmp_path)])
    assert facts["ignores"] == str([int(signal.SIGUSR2), int(signal.SIGPIPE), int(signal.SIGXFSZ)])
    assert facts["descriptors"] == "[0, 1, 2]"
    proc = Path(f"/proc/{start.pid}")
    assert (proc / "cmdline").read_bytes().rstrip(b"\0").decode().split("\0")[:4] == _STARTED
    environment = (proc / "environ").read_bytes().split(b"\0")
    assert environment.count(b"SUBJECT=one") == 1
    assert not any(entry.startswith(b"SHARDLINE_TEST_ROOM") for entry in environment)


@pytest.mark.parametrize(
    ("order", "status", "said"),
    [
        ("exit 75", 75, ""),
        ("exit", 0, ""),
        ("sentence", 1, "a sentence\n"),
        ("raise", 1, "ZeroDivisionError: it did\n"),
        ("kill", -signal.SIGKILL, ""),
        ("abort", -signal.SIGABRT, None),
    ],
)
def test_it_ends_as_it_would(start: subprocess.Popen[str], order: str, status: int, said: str | None) -> None:
    _facts(start)
    _tell(start, order)
    _, errors = start.communicate(timeout=60)
    assert start.returncode == status
    if said is not None:
        assert errors.endswith(said)
        assert "tests/zygote/" not in errors


def test_an_interrupt_ends_it(start: subprocess.Popen[str]) -> None:
    _facts(start)
    start.send_signal(signal.SIGINT)
    _, errors = start.communicate(timeout=60)
    assert (start.returncode, errors.splitlines()[-1]) == (-signal.SIGINT, "KeyboardInterrupt")


def test_its_child_is_its_own_and_ends_with_it(start: subprocess.Popen[str]) -> None:
    is_clone = _facts(start)["is_clone"]
    _tell(start, "child")
    facts = _facts(start)
    child = int(facts["pid"])
    assert (int(facts["parent"]), facts["is_clone"], facts["SUBJECT"]) == (start.pid, is_clone, "two")
    start.kill()
    start.wait()
    wait_until(lambda: not Path(f"/proc/{child}").exists(), timeout_s=30, what="the end of the child")


def test_it_may_become_another_program(start: subprocess.Popen[str]) -> None:
    is_clone = _facts(start)["is_clone"]
    _tell(start, "exec")
    facts = _facts(start)
    assert (int(facts["pid"]), facts["SUBJECT"], facts["is_clone"]) == (start.pid, "three", is_clone)
    # What a program handles is the next one's no more.
    assert facts["handles"] == str([int(signal.SIGINT)])


def _said_in(environment: dict[str, str]) -> str:
    with from_zygote():
        finished = subprocess.run(
            [*_STARTED, "only"],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            cwd=ROOT,
            check=True,
        )
    return finished.stdout


def test_what_libraries_would_read_at_import_is_a_real_start(tmp_path: Path) -> None:
    assert "is_clone=False" in _said_in(command_environment(HF_HOME=str(tmp_path)))


@pytest.mark.parametrize("library", ["accelerate", "deepspeed", "lightning_fabric", "peft", "sklearn", "wandb"])
def test_what_a_library_sets_where_a_test_imports_it_is_not(library: str) -> None:
    pytest.importorskip(library)
    assert "is_clone=True" in _said_in(command_environment())
