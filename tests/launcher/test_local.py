"""Supervision: a real launcher and each real agent over stand-in ranks, and every way they can end."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest

from launcher import local, stop_signals
from launcher.stop_signals import StopSignals
from sharding.ranks.local_group import free_port
from tests.support import ROOT, command_environment, from_zygote, start_module, wait_until
from trainer.run_folder.folder import RunFolder

pytestmark = pytest.mark.timeout(60)

each_launcher = pytest.mark.parametrize("launcher", ["torchrun", "deepspeed", "accelerate"])
# Accelerate's agent of several ranks is torchrun's.
each_agent = pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])


class Supervised:
    """A launcher over two ranks, and the processes below it."""

    def __init__(self, behaviour: str, launcher: str, path: Path, is_real: bool = False, **environment: str) -> None:
        self.folder = RunFolder(path)
        self.token = f"token-{behaviour}-{path}"
        with nullcontext() if is_real else from_zygote():
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.launcher.supervisor", launcher, behaviour, str(path)],
                cwd=ROOT,
                env=command_environment(**environment),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )

    def wait_for_ranks(self) -> None:
        wait_until(lambda: all((self.folder.path / f"pid-{rank}").exists() for rank in (0, 1)), what="ranks")

    def descendants(self) -> list[int]:
        return list(local._marked(self.token))

    def end(self, timeout_s: float = 30) -> tuple[int, str, str]:
        """Exit status, output and last line of standard error; asserts that nothing is left."""
        output, errors = self.process.communicate(timeout=timeout_s)
        assert self.descendants() == []
        lines = errors.strip().splitlines()
        return self.process.returncode, output, lines[-1] if lines else ""


@pytest.fixture
def supervise(tmp_path: Path) -> Iterator[Callable[..., Supervised]]:
    started: list[Supervised] = []

    def start(behaviour: str, launcher: str = "torchrun", is_real: bool = False, **environment: str) -> Supervised:
        started.append(Supervised(behaviour, launcher, tmp_path, is_real, **environment))
        return started[-1]

    yield start
    for supervised in started:
        supervised.process.kill()
        supervised.process.communicate()
        local.kill_marked(supervised.token)


@each_launcher
def test_finished(supervise: Callable[..., Supervised], launcher: str) -> None:
    supervised = supervise("finish", launcher, is_real=True)
    status, output, last = supervised.end()
    assert (status, last) == (0, "")
    assert output.splitlines()[-1] == f"finished at step 6: {supervised.folder.path}"


def test_a_users_defaults_of_accelerate_change_nothing(supervise: Callable[..., Supervised], tmp_path: Path) -> None:
    folder = tmp_path / "home" / "accelerate"
    folder.mkdir(parents=True)
    (folder / "default_config.yaml").write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: DEEPSPEED\ndeepspeed_config: {zero_stage: 3}\n"
        "mixed_precision: bf16\nnum_machines: 3\nnum_processes: 12\nmachine_rank: 1\nmain_process_ip: 192.0.2.1\n"
    )
    status, _, last = supervise("finish", "accelerate", HF_HOME=str(tmp_path / "home")).end()
    assert (status, last) == (0, "")


@each_launcher
def test_one_interrupt_saves_and_stops(supervise: Callable[..., Supervised], launcher: str) -> None:
    supervised = supervise("stoppable", launcher)
    supervised.wait_for_ranks()
    supervised.process.send_signal(signal.SIGINT)
    status, output, last = supervised.end()
    assert (status, last) == (75, "")
    assert "stopping after this step and saving; Ctrl-C again ends now" in output
    assert output.splitlines()[-1] == "stopped at step 4, saved; run the same command again to continue"
    assert supervised.folder.stop_file.read_text() == "signal to the launcher\n"


def test_a_terminal_that_goes_away_saves_and_stops(supervise: Callable[..., Supervised]) -> None:
    supervised = supervise("stoppable")
    supervised.wait_for_ranks()
    assert supervised.process.stdout is not None
    assert supervised.process.stderr is not None
    # Nobody reads any more, as on a terminal that is closed.
    supervised.process.stdout.close()
    supervised.process.stderr.close()
    supervised.process.send_signal(signal.SIGHUP)
    assert supervised.process.wait(30) == 75
    assert supervised.descendants() == []


@pytest.mark.timing
def test_a_run_that_nobody_is_to_hang_up_goes_on(supervise: Callable[..., Supervised]) -> None:
    """As under ``nohup``."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        supervised = supervise("stoppable")
    finally:
        signal.signal(signal.SIGHUP, before)
    supervised.wait_for_ranks()
    supervised.process.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    assert supervised.folder.read_outcome() is None
    supervised.process.send_signal(signal.SIGTERM)
    assert supervised.end()[0] == 75


@each_launcher
def test_signals_to_every_process_save_and_stop_too(supervise: Callable[..., Supervised], launcher: str) -> None:
    """As batch systems do: of SIGUSR1 an agent would die, at SIGTERM end its ranks, were it not shielded."""
    supervised = supervise("stoppable", launcher)
    supervised.wait_for_ranks()
    processes = [supervised.process.pid, *supervised.descendants()]
    for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGTERM):
        for pid in processes:
            os.kill(pid, number)
    assert supervised.end()[0] == 75


def test_ranks_that_cannot_be_asked_by_file_are_asked_by_signal(supervise: Callable[..., Supervised]) -> None:
    supervised = supervise("stoppable-by-signal")
    supervised.wait_for_ranks()
    # A folder cannot be replaced by a file.
    supervised.folder.stop_file.mkdir()
    supervised.process.send_signal(signal.SIGINT)
    assert supervised.end()[0] == 75


@pytest.mark.timing
@each_agent
def test_a_second_interrupt_ends_at_once(supervise: Callable[..., Supervised], launcher: str) -> None:
    supervised = supervise("endless", launcher)
    supervised.wait_for_ranks()
    supervised.process.send_signal(signal.SIGINT)
    wait_until(supervised.folder.stop_file.exists)
    time.sleep(stop_signals._SAME_SIGNAL_S)
    sent_at = time.monotonic()
    supervised.process.send_signal(signal.SIGINT)
    status, _, last = supervised.end()
    assert time.monotonic() - sent_at < 5
    assert status == 130
    assert last == "error: ended at once by a second signal; nothing was saved yet"
    outcome = supervised.folder.read_outcome()
    assert outcome is not None
    assert (outcome["status"], outcome["exit_code"]) == ("failed", 130)


@each_launcher
def test_nothing_outlives_a_killed_launcher(supervise: Callable[..., Supervised], launcher: str) -> None:
    supervised = supervise("endless", launcher)
    supervised.wait_for_ranks()
    assert len(supervised.descendants()) == 3
    supervised.process.kill()
    wait_until(lambda: not supervised.descendants(), timeout_s=5, what="the end of agent and ranks")


@each_agent
def test_nothing_outlives_a_killed_agent(supervise: Callable[..., Supervised], launcher: str) -> None:
    supervised = supervise("endless", launcher)
    supervised.wait_for_ranks()
    ranks = [int((supervised.folder.path / f"pid-{rank}").read_text()) for rank in (0, 1)]
    (agent,) = set(supervised.descendants()) - set(ranks)
    os.kill(agent, signal.SIGKILL)
    status, _, last = supervised.end()
    assert (status, last) == (1, f"error: {launcher}'s agent was killed by SIGKILL without a report")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_ranks_save_and_stop_when_the_bare_deepspeed_command_is_killed(tmp_path: Path, number: signal.Signals) -> None:
    """DeepSpeed itself would leave its launcher and the ranks running."""
    folder = RunFolder(tmp_path)
    options = ("--num_gpus=2", f"--master_port={free_port()}", "--module", "tests.launcher.stand_in_rank")
    process = start_module("deepspeed.launcher.runner", *options, "stoppable", tmp_path, log=tmp_path / "log")
    wait_until(lambda: all((tmp_path / f"pid-{rank}").exists() for rank in (0, 1)), what="ranks")
    process.send_signal(number)
    process.wait(10)
    wait_until(lambda: not _alive_of(tmp_path), timeout_s=10, what="the end of launcher and ranks")
    outcome = folder.read_outcome()
    assert outcome is not None
    assert outcome["exit_code"] == 75


def _alive_of(path: Path) -> list[int]:
    """Processes that have this folder on their command line; a zombie has none."""
    alive = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if str(path) in (entry / "cmdline").read_text().split("\0"):
                alive.append(int(entry.name))
    return alive


@each_agent
def test_a_killed_rank_is_named_and_not_what_its_peers_make_of_it(
    supervise: Callable[..., Supervised], launcher: str
) -> None:
    supervised = supervise("killed", launcher)
    status, _, last = supervised.end()
    reason = "the process was killed by SIGKILL, from outside or by the kernel: no trace of the OOM killer was found"
    assert (status, last) == (1, f"error: rank 1: {reason}")
    outcome = supervised.folder.read_outcome()
    assert outcome is not None
    assert (outcome["status"], outcome["reason"], outcome["rank"]) == ("failed", reason, 1)


@pytest.mark.timing
@pytest.mark.parametrize(
    ("behaviour", "error", "launcher"),
    [
        ("raise", "ValueError: a wrong number", "torchrun"),
        # Before the rank could report anything.
        ("import-error", "ModuleNotFoundError: No module named 'a_module_that_nobody_has'", "torchrun"),
        ("import-error", "ModuleNotFoundError: No module named 'a_module_that_nobody_has'", "deepspeed"),
    ],
)
def test_the_failing_ranks_own_error_comes_last_and_soon(
    supervise: Callable[..., Supervised], behaviour: str, error: str, launcher: str
) -> None:
    """Also where the other rank hangs, as in a collective, and takes the agent's SIGTERM for a request to stop."""
    started_at = time.monotonic()
    status, _, last = supervise(behaviour, launcher).end()
    assert (status, last) == (1, f"error: rank 1: {error}")
    # The agent alone would wait 30 s for the other rank.
    assert time.monotonic() - started_at < 25


@each_agent
def test_bad_input_that_only_ranks_can_see(supervise: Callable[..., Supervised], launcher: str) -> None:
    supervised = supervise("bad-input", launcher)
    status, _, last = supervised.end()
    assert (status, last) == (2, "error: data.paths names no file; check the path.")


@pytest.mark.parametrize(
    ("received", "at_once"),
    [
        ([(signal.SIGINT, 0.0)], False),
        ([(signal.SIGINT, 0.0), (signal.SIGINT, 0.1)], False),
        ([(signal.SIGINT, 0.0), (signal.SIGINT, 2.0)], True),
        ([(signal.SIGUSR1, 0.0), (signal.SIGINT, 2.0)], True),
        ([(signal.SIGUSR1, 0.0), (signal.SIGTERM, 2.0)], False),
        ([(signal.SIGUSR1, 0.0), (signal.SIGUSR1, 2.0)], False),
        ([(signal.SIGTERM, 0.0), (signal.SIGTERM, 2.0)], True),
        ([(signal.SIGHUP, 0.0), (signal.SIGHUP, 2.0)], False),
    ],
)
def test_which_signals_end_at_once(
    monkeypatch: pytest.MonkeyPatch, received: list[tuple[signal.Signals, float]], at_once: bool
) -> None:
    signals = StopSignals()
    for number, at in received:
        monkeypatch.setattr(stop_signals.time, "monotonic", lambda at=at: 1000.0 + at)
        signals.receive(number, None)
    assert signals.stop
    assert signals.at_once == at_once
