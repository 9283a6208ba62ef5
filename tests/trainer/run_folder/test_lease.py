"""One writer per run folder."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from sharding.ranks.errors import RunFailure, UserError
from tests.support import ROOT, wait_until
from trainer.run_folder import lease as lease_module
from trainer.run_folder.folder import RunFolder
from trainer.run_folder.lease import Lease, is_taken_over, record_attempt
from trainer.run_folder.lease_holder import Verdict, judge, new_holder

pytestmark = pytest.mark.timeout(60)

HOLD = """
import sys, time
from pathlib import Path
from trainer.run_folder.lease import Lease, record_attempt
lease = Lease.acquire(Path(sys.argv[1]))
record_attempt(Path(sys.argv[1]), 3)
print("held", flush=True)
time.sleep(60)
"""

RACE = """
import sys, time
from pathlib import Path
from sharding.ranks.errors import UserError
from trainer.run_folder.lease import Lease
print("ready", flush=True)
sys.stdin.readline()
try:
    Lease.acquire(Path(sys.argv[1]))
    print("won", flush=True)
except UserError:
    print("lost", flush=True)
sys.stdin.readline()
"""


def start(program: str, folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", program, str(folder)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "lease.json").read_text())


def rewrite(folder: Path, **changes: Any) -> None:
    (folder / "lease.json").write_text(json.dumps(read(folder) | changes))


def test_a_live_holder_is_named_and_a_killed_one_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with start(HOLD, tmp_path) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError) as refused:
            Lease.acquire(tmp_path)
        holder.send_signal(signal.SIGKILL)
    message = str(refused.value)
    assert f"process {holder.pid} on {socket.gethostname()}, attempt 3" in message
    assert "its process is running" in message
    assert f"touch {tmp_path}/stop" in message

    lease = Lease.acquire(tmp_path)
    assert f"taking over run folder {tmp_path} from process {holder.pid}" in caplog.text
    lease.check()
    assert read(tmp_path)["pid"] == os.getpid()
    lease.release()
    assert not (tmp_path / "lease.json").exists()


def test_of_many_that_ask_at_once_one_wins(tmp_path: Path) -> None:
    racers = [start(RACE, tmp_path) for _ in range(6)]
    try:
        for racer in racers:
            assert racer.stdout is not None
            assert racer.stdout.readline() == "ready\n"
        for racer in racers:
            assert racer.stdin is not None
            racer.stdin.write("go\n")
            racer.stdin.flush()
        results = [racer.stdout.readline().strip() for racer in racers if racer.stdout is not None]
        assert sorted(results) == ["lost"] * 5 + ["won"]
    finally:
        for racer in racers:
            racer.kill()
            racer.communicate()


def test_another_process_with_the_same_id_is_not_the_holder(tmp_path: Path) -> None:
    lease = Lease.acquire(tmp_path)
    rewrite(tmp_path, process_started="1")
    successor = Lease.acquire(tmp_path)
    with pytest.raises(RunFailure, match="was taken over: its lease is held by process"):
        lease.check()
    successor.release()


def elsewhere(folder: Path, **changes: Any) -> None:
    """A lease of another host, or of another container of this one, whose process ids mean nothing here."""
    Lease.acquire(folder).release()
    lease = new_holder("theirs") | {"process_space": "elsewhere", "host": "node7", "pid": 1} | changes
    (folder / "lease.json").write_text(json.dumps(lease))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "STALE_AFTER_S", 1.2)
    monkeypatch.setattr(lease_module, "_LOOK_EVERY_S", 0.02)


@pytest.mark.timing
@pytest.mark.parametrize("clock_s", [-3600.0, -61.0, 0.0, 3600.0])
def test_elsewhere_the_heartbeat_tells_whatever_clocks_say(
    tmp_path: Path, quick: None, caplog: pytest.LogCaptureFixture, clock_s: float
) -> None:
    elsewhere(tmp_path, heartbeat=time.time() + clock_s)
    with ThreadPoolExecutor(1) as beats:
        beats.submit(lambda: (time.sleep(0.1), rewrite(tmp_path, num_beats=1)))
        with pytest.raises(
            UserError, match=r"in use by process 1 on node7 \(its heartbeat goes on\); wait for it, stop"
        ):
            Lease.acquire(tmp_path)
    assert "held by process 1 on node7, whose process cannot be seen from here: watching its heartbeat" in caplog.text
    # Nothing beats any longer, and nobody looks at what is written.
    successor = Lease.acquire(tmp_path)
    successor.check()
    assert "taking over" in caplog.text
    successor.release()


@pytest.mark.timing
def test_a_holder_that_cannot_be_seen_for_a_moment_is_not_taken_for_dead(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere(tmp_path)
    look = lease_module._read
    # Its file is not there at the second look alone.
    looks: Iterator[Callable[[Path], dict[str, Any] | None]] = iter([look, lambda _: None])
    monkeypatch.setattr(lease_module, "_read", lambda path: next(looks, look)(path))
    with ThreadPoolExecutor(1) as beats:
        beats.submit(lambda: (time.sleep(0.4), rewrite(tmp_path, num_beats=1)))
        with pytest.raises(UserError, match="its heartbeat goes on"):
            Lease.acquire(tmp_path)
    assert read(tmp_path)["token"] == "theirs"


def test_of_two_that_watch_a_dead_holder_one_wins(tmp_path: Path, quick: None) -> None:
    elsewhere(tmp_path)
    barrier = threading.Barrier(2)

    def acquire() -> Lease | None:
        barrier.wait()
        with suppress(UserError):
            return Lease.acquire(tmp_path)
        return None

    with ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(acquire) for _ in range(2)]
        (winner,) = [lease for lease in (future.result() for future in asked) if lease is not None]
    winner.check()
    winner.release()


def test_a_job_that_slurm_started_again_takes_over_from_its_dead_node_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    elsewhere(tmp_path, slurm_job=[12, 0])
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    Lease.acquire(tmp_path).release()
    assert "watching" not in caplog.text


def slurm(folder: Path, squeue: str) -> str:
    """A PATH with Slurm's commands on cluster ``one``, of which squeue does as told."""
    folder.mkdir()
    for name, does in (("squeue", squeue), ("scontrol", "echo 'ClusterName             = one'")):
        (folder / name).write_text(f"#!/bin/sh\n{does}\n")
        (folder / name).chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


@pytest.mark.parametrize(
    ("squeue", "cluster", "is_gone"),
    [
        ("echo NODE_FAIL", "one", True),
        ("echo PENDING", "one", True),
        ("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", "one", True),
        # Of another cluster's jobs this one's Slurm knows nothing.
        ("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", "two", False),
        ("echo NODE_FAIL", None, False),
        ("echo RUNNING", "one", False),
        ("echo COMPLETING", "one", False),
        ("echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1", "one", False),
    ],
)
def test_slurm_knows_of_a_holder_whose_job_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, squeue: str, cluster: str | None, is_gone: bool
) -> None:
    monkeypatch.setenv("PATH", slurm(tmp_path / "bin", squeue))
    holder = new_holder("theirs") | {"process_space": "elsewhere", "slurm_job": [12, 0], "slurm_cluster": cluster}
    assert judge(holder) is (Verdict.GONE if is_gone else Verdict.UNKNOWN)


@pytest.mark.timing
def test_a_heartbeat_outlives_a_moment_without_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "HEARTBEAT_EVERY_S", 0.02)
    lease = Lease.acquire(tmp_path)
    hidden = tmp_path / "hidden.json"
    (tmp_path / "lease.json").rename(hidden)
    with ThreadPoolExecutor(1) as pool:
        checked = pool.submit(lease.check)
        time.sleep(0.3)
        # Nothing is written in its place: a successor may have come and gone.
        assert not (tmp_path / "lease.json").exists()
        hidden.rename(tmp_path / "lease.json")
        num_beats = read(tmp_path)["num_beats"]
        wait_until(lambda: read(tmp_path)["num_beats"] > num_beats + 1, timeout_s=5)
        checked.result()
    lease.release()


def test_a_lease_that_cannot_be_read_is_a_failure_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_module, "SETTLE_WITHIN_S", 0.05)
    lease = Lease.attach(tmp_path, "mine")

    def stale(_: Path) -> None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(lease_module, "_read", stale)
    with pytest.raises(RunFailure, match=r"cannot be read \(Stale file handle\); nothing was saved"):
        lease.check()
    # What a run says of its end goes on to be written.
    assert not is_taken_over(tmp_path, "mine")
    assert RunFolder(tmp_path).write_outcome("failed", 1, 3, "the true reason", 0)


@pytest.mark.timing
def test_a_lost_lease_is_neither_renewed_nor_released(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "HEARTBEAT_EVERY_S", 0.02)
    lease = Lease.acquire(tmp_path)
    rewrite(tmp_path, token="theirs", heartbeat=1.0)
    time.sleep(0.1)
    lease.release()
    assert read(tmp_path)["token"] == "theirs"
    assert read(tmp_path)["heartbeat"] == 1.0
    assert is_taken_over(tmp_path, lease.token)
    assert not is_taken_over(tmp_path, "theirs")
    assert not is_taken_over(tmp_path, None)


def test_the_heartbeat_goes_on_and_keeps_the_attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "HEARTBEAT_EVERY_S", 0.02)
    lease = Lease.acquire(tmp_path)
    record_attempt(tmp_path, 2)
    first = read(tmp_path)
    wait_until(lambda: read(tmp_path)["num_beats"] > first["num_beats"] + 1, timeout_s=5)
    assert read(tmp_path)["heartbeat"] > first["heartbeat"]
    assert read(tmp_path)["attempt"] == 2
    lease.release()


def test_a_rank_attaches_to_its_launchers_lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lease = Lease.acquire(tmp_path)
    attached = Lease.attach(tmp_path, lease.token)
    attached.check()
    lease.release()
    monkeypatch.setattr(lease_module, "SETTLE_WITHIN_S", 0.05)
    with pytest.raises(RunFailure, match="its lease is held by nobody"):
        attached.check()


@pytest.mark.parametrize("corrupt", ["", "{", "[]", '{"host": "a"}'])
def test_a_corrupt_lease_is_none(tmp_path: Path, corrupt: str) -> None:
    (tmp_path / "lease.json").write_text(corrupt)
    Lease.acquire(tmp_path).release()


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written: Not a directory; choose another output_dir"):
        Lease.acquire(tmp_path / "file" / "run")
