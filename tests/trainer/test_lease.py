"""One writer per run folder."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from sharding.errors import RunFailure, UserError
from tests.support import ROOT, wait_until
from trainer import lease as lease_module
from trainer.lease import Lease, is_taken_over, record_attempt

pytestmark = pytest.mark.timeout(60)

HOLD = """
import sys, time
from pathlib import Path
from trainer.lease import Lease, record_attempt
lease = Lease.acquire(Path(sys.argv[1]))
record_attempt(Path(sys.argv[1]), 3)
print("held", flush=True)
time.sleep(60)
"""

RACE = """
import sys, time
from pathlib import Path
from sharding.errors import UserError
from trainer.lease import Lease
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
    assert "last sign of life 0 s ago" in message
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


def test_elsewhere_the_heartbeat_tells(tmp_path: Path) -> None:
    """Another host, and as well another container of this host, whose process ids mean nothing here."""
    Lease.acquire(tmp_path).release()
    lease = Lease.acquire(tmp_path)
    rewrite(tmp_path, process_space="elsewhere", host="node7", pid=1, token="theirs", heartbeat=time.time() - 50)
    with pytest.raises(UserError, match=r"process 1 on node7 \(last sign of life 50 s ago\)"):
        Lease.acquire(tmp_path)
    rewrite(tmp_path, heartbeat=time.time() - 61)
    successor = Lease.acquire(tmp_path)
    successor.check()
    with pytest.raises(RunFailure):
        lease.check()
    successor.release()


def test_a_job_that_slurm_started_again_takes_over_from_its_dead_node_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    lease = Lease.acquire(tmp_path)
    lease.release()
    Lease.acquire(tmp_path)
    rewrite(tmp_path, process_space="elsewhere", host="node7", pid=1, token="theirs", heartbeat=time.time() - 5)
    with pytest.raises(UserError, match="process 1 on node7"):
        Lease.acquire(tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", "13")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with pytest.raises(UserError, match="process 1 on node7"):
        Lease.acquire(tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    Lease.acquire(tmp_path).release()


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
    first = read(tmp_path)["heartbeat"]
    wait_until(lambda: read(tmp_path)["heartbeat"] > first, timeout_s=5)
    assert read(tmp_path)["attempt"] == 2
    lease.release()


def test_a_rank_attaches_to_its_launchers_lease(tmp_path: Path) -> None:
    lease = Lease.acquire(tmp_path)
    attached = Lease.attach(tmp_path, lease.token)
    attached.check()
    lease.release()
    with pytest.raises(RunFailure, match="its lease is held by nobody"):
        attached.check()


@pytest.mark.parametrize("damaged", ["", "{", "[]", '{"host": "a"}'])
def test_a_damaged_lease_is_none(tmp_path: Path, damaged: str) -> None:
    (tmp_path / "lease.json").write_text(damaged)
    Lease.acquire(tmp_path).release()


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written: Not a directory; choose another output_dir"):
        Lease.acquire(tmp_path / "file" / "run")
