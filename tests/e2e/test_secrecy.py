"""What a run shows to others: no secret in anything that it writes, no socket beyond this machine; and what it
does not take from others: code that lies where it is started."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import PLANTED_VARIABLE, command_environment, plant_modules, read_metrics, wait_until

MakeConfig = Callable[..., Path]

_PLANTED = {
    "WANDB_API_KEY": "5" * 8 + "c0ffee" * 5 + "42",
    "HF_TOKEN": "hf_plantedplantedplantedplantedplanted",
    "AWS_ACCESS_KEY_ID": "AKIAPLANTEDPLANTED77",
    "GITHUB_PAT": "planted-personal-access-1",
    "DATABASE_URL": "postgresql://me:planted-password-2@db/runs",
    "AWS_SECRET_ACCESS_KEY": "planted/aws/secret/planted/aws/secret/00",
}
_MARK = "SHARDLINE_TEST_MARK"
# Addresses as /proc/net has them: 127.0.0.1, ::1, and the first written as IPv6.
_LOOPBACK = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}
_LISTENING = "0A"


def _started_with(mark: str) -> list[Path]:
    """Processes that have a mark in their environment."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and f"{_MARK}={mark}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                found.append(entry)
        except OSError:
            continue
    return found


def _listening_addresses(mark: str) -> list[tuple[str, str]]:
    """Command line and local address of each socket on which a marked process listens."""
    addresses = {}
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            columns = line.split()
            if columns[3] == _LISTENING:
                addresses[f"socket:[{columns[9]}]"] = columns[1].partition(":")[0]
    found = []
    for process in _started_with(mark):
        command = (process / "cmdline").read_bytes().decode().replace("\0", " ")
        assert not any(value in command for value in _PLANTED.values())
        for descriptor in (process / "fd").iterdir():
            target = os.readlink(descriptor) if descriptor.is_symlink() else ""
            if target in addresses:
                found.append((command, addresses[target]))
    return found


def _files_with_secrets(folder: Path) -> list[tuple[str, str]]:
    return [
        (str(path), name)
        for path in folder.rglob("*")
        if path.is_file()
        for name, value in _PLANTED.items()
        if value.encode() in path.read_bytes()
    ]


@pytest.mark.parametrize(
    "launcher",
    ["torchrun", *(pytest.param(name, marks=pytest.mark.slow) for name in ("deepspeed", "accelerate"))],
)
def test_a_run_keeps_to_itself(make_config: MakeConfig, tmp_path: Path, launcher: str) -> None:
    config = make_config(
        "quiet", steps=400, schedule={"total_steps": 400}, tracking={"wandb": {"mode": "offline", "project": "quiet"}}
    )
    run_dir = config.parent / "runs" / "quiet"
    imported = tmp_path / "imported.txt"
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [
                sys.executable,
                "-P",
                "-m",
                "launcher",
                "run",
                str(config),
                "--nproc-per-node=2",
                f"--launcher={launcher}",
            ],
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            cwd=plant_modules(tmp_path / "planted"),
            env=command_environment(**_PLANTED, **{_MARK: str(tmp_path), PLANTED_VARIABLE: str(imported)}),
        )
    wait_until(lambda: len(read_metrics(run_dir)) >= 3, what="step 3")
    # wandb starts beside training, and on a busy machine later than the third step.
    wait_until(lambda: any((run_dir / "wandb").rglob("*.wandb")), what="wandb's record")
    listening = _listening_addresses(str(tmp_path))
    # The agent or rank 0 with the rendezvous, and both ranks with gloo.
    assert len(listening) >= 3, listening
    assert {address for _, address in listening} <= _LOOPBACK, listening
    process.send_signal(signal.SIGINT)
    assert process.wait(90) == 75
    assert (run_dir / "report.html").exists()
    assert not imported.exists()
    assert _files_with_secrets(run_dir) == []
    assert _files_with_secrets(tmp_path) == []
    (run_dir / "planted").write_text(_PLANTED["HF_TOKEN"])
    assert _files_with_secrets(run_dir) == [(str(run_dir / "planted"), "HF_TOKEN")]
