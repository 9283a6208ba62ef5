"""One node's part of a job, and the port where ranks meet, without a Slurm."""

import os
import signal
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from launcher.slurm import node
from launcher.slurm.port import meeting_port
from launcher.slurm.restart import main as restart
from sharding.ranks.errors import RunFailure, UserError
from sharding.ranks.slurm_step import job_port
from trainer.config import load_config
from trainer.faults.failure.record import FAILURE_NAME, Failure, FailureKind
from trainer.run_folder.folder import RunFolder
from trainer.runtime.stopping import stop_signals

_STEP = {
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_NODEID": "1",
    "SHARDLINE_RANKS_PER_NODE": "2",
    "MASTER_PORT": "12000",
}
_STOPPED = '{"status": "stopped", "exit_code": 75, "step": 3, "reason": "on request", "rank": null}'


@pytest.fixture
def own_signals() -> Iterator[None]:
    previous = {number: signal.getsignal(number) for number in stop_signals()}
    yield
    for number, handler in previous.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("own_signals")
@pytest.mark.parametrize(
    ("agent", "status"),
    [
        # torchrun's own status where ranks ended with 75: srun would take it for a failure and end the other nodes.
        (f"echo '{_STOPPED}' > new; mv new outcome.json; exit 1", 0),
        (f"echo '{_STOPPED}' > new; mv new outcome.json; kill -9 $$", 0),
        ("rm outcome.json; exit 1", 1),
        # It failed before the attempt began: the outcome is that of the one before.
        ("exit 1", 1),
        ("kill -9 $$", 137),
        ("exit 0", 0),
    ],
)
def test_a_node_whose_run_has_stopped_and_saved_has_not_failed(
    config_file: Path, monkeypatch: pytest.MonkeyPatch, agent: str, status: int
) -> None:
    run_folder = RunFolder(load_config(config_file).run_dir)
    run_folder.path.mkdir(parents=True)
    run_folder.outcome_file.write_text(_STOPPED)
    monkeypatch.setitem(node._COMMANDS, "torchrun", lambda *_: ["bash", "-c", f"cd {run_folder.path}; {agent}"])
    assert node.run_node("torchrun", [str(config_file)], {**os.environ, **_STEP}) == status


@pytest.fixture
def taken() -> Iterator[int]:
    """The usual port of the job, at which another process listens."""
    with socket.create_server(("127.0.0.1", job_port(_JOB))):
        yield job_port(_JOB)


_JOB = 100_000 + os.getpid() % 500
_SLURM = {"SLURM_JOB_ID": str(_JOB)}


@pytest.mark.parametrize("usual", [{}, {"MASTER_PORT": str(job_port(_JOB))}], ids=["first", "restart"])
def test_a_port_that_is_taken_gives_way_to_the_next(config_file: Path, taken: int, usual: Mapping[str, str]) -> None:
    config = load_config(config_file)
    assert meeting_port(config, {**_SLURM, **usual}) == job_port(_JOB, 1) != taken


def test_a_port_of_ones_own_is_kept_or_refused(config_file: Path, taken: int) -> None:
    config = load_config(config_file, [f"launch.master_port={taken}"])
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=f"^MASTER_PORT={port} is taken on {socket.gethostname()}, where the ranks"):
            meeting_port(config, {**_SLURM, "MASTER_PORT": str(port)})
        config = load_config(config_file, [f"launch.master_port={port}"])
        with pytest.raises(UserError, match=f"^launch.master_port={port} is taken"):
            meeting_port(config, _SLURM)
    assert meeting_port(config, _SLURM) == port
    with pytest.raises(UserError, match=r"^MASTER_PORT=http is not a number"):
        meeting_port(config, {**_SLURM, "MASTER_PORT": "http"})


def test_a_job_whose_ports_are_all_taken_fails(config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launcher.slurm.port._is_free", lambda port: False)
    with pytest.raises(RunFailure, match=r"are all taken on .*; set launch.master_port to one that is free"):
        meeting_port(load_config(config_file), _SLURM)


def test_a_restart_tells_the_batch_script_the_next_port(
    config_file: Path, taken: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    path = load_config(config_file).run_dir
    (path / "logs" / "attempt-1").mkdir(parents=True)
    failure = Failure(kind=FailureKind.EXCEPTION, signature="x", attempt=1, step=3, rank=0, reason="OSError: in use")
    (path / FAILURE_NAME).write_text(failure.model_dump_json())
    monkeypatch.setenv("SLURM_JOB_ID", str(_JOB))
    monkeypatch.setenv("MASTER_PORT", str(taken))
    overrides = ["faults.max_restarts=1", "faults.restart_backoff_s=0"]
    assert restart(["0", str(config_file), *overrides]) == 0
    printed = capfd.readouterr()
    assert printed.out == f"export MASTER_PORT={job_port(_JOB, 1)}\n"
    assert "restart 1 of 1 in 0 s" in printed.err
