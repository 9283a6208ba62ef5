"""failure.json and failure.md, from what ranks, launcher and kernel leave."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from sharding.ranks.errors import NonFiniteFailure, UserError
from tests.support import ROOT, command_environment
from tests.trainer.faults.test_deadlines import beat
from trainer.faults.failure.rank_error import ELASTIC_ERROR_VARIABLE, describe_error, is_of_a_peer, write_rank_error
from trainer.faults.failure.record import Evidence, Failure, FailureKind, RankState, read_failure, set_failure_aside
from trainer.faults.failure.report import ProcessEnd, Sources, build_failure, write_failure
from trainer.faults.hang.heartbeat import HeartbeatFile
from trainer.faults.hang.rank_progress import ProgressMemory, RankProgress, publish_progress, read_progress
from trainer.runtime.phases import Phase, Phases, PhaseState

PEER_GONE = "[pair.cc:553] Connection closed by peer [127.0.0.1]:27027."


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "logs" / "attempt-1").mkdir(parents=True)
    return tmp_path


def leave(run_dir: Path, *heartbeats: dict[str, Any], **errors: BaseException) -> Path:
    """Let ranks have left heartbeats, and errors as ``rank_1=...``."""
    log_dir = run_dir / "logs" / "attempt-1"
    for rank, changes in enumerate(heartbeats):
        HeartbeatFile(log_dir, rank).write(beat(rank, **changes))
    for name, error in errors.items():
        try:
            raise error
        except BaseException as caught:
            described = describe_error(caught, int(name.removeprefix("rank_")), PhaseState(Phase.AGREE, 7, 0.0))
        write_rank_error(log_dir, described)
    return log_dir


def outcome(reason: str = "RuntimeError: x", rank: int | None = 0, **changes: Any) -> dict[str, Any]:
    return {"status": "failed", "exit_code": 1, "step": 6, "reason": reason, "rank": rank} | changes


def test_an_error_goes_before_what_it_does_to_the_others(run_dir: Path) -> None:
    leave(run_dir, {}, {}, rank_0=RuntimeError(PEER_GONE), rank_1=ZeroDivisionError("by zero"))
    # Rank 0 was faster to write the outcome.
    failure = build_failure(Sources(run_dir, 1, outcome(PEER_GONE, 0), ends={1: ProcessEnd(1, 5.0)}, first=1))
    assert (failure.kind, failure.rank, failure.step, failure.phase) == (FailureKind.EXCEPTION, 1, 7, Phase.AGREE)
    assert failure.where is not None
    assert failure.where.startswith("faults/test_failure_report.py:")
    assert failure.signature == f"exception ZeroDivisionError at {failure.where} in step 7"
    assert [state.role for state in failure.ranks] == ["running", "first"]
    assert any("ZeroDivisionError: by zero" in one.text for one in failure.evidence)


def test_a_line_to_a_hub_that_breaks_is_no_peers_fault(run_dir: Path) -> None:
    hub = ConnectionResetError(104, "Connection reset by peer")
    leave(run_dir, {}, {}, rank_0=RuntimeError(PEER_GONE), rank_1=hub)
    failure = build_failure(Sources(run_dir, 1, outcome(f"RuntimeError: {PEER_GONE}", 0)))
    assert (failure.kind, failure.rank) == (FailureKind.EXCEPTION, 1)
    assert "ConnectionResetError" in failure.signature


@pytest.mark.parametrize(
    ("kind", "message", "is_peers"),
    [
        ("RuntimeError", PEER_GONE, True),
        ("RuntimeError", "[/x/gloo/transport/tcp/pair.cc:144] writev: Connection reset by peer", True),
        ("DistNetworkError", "Connection reset by peer", True),
        ("DistBackendError", "NCCL error: ncclRemoteError: remote process exited", True),
        ("ConnectionError", "('Connection aborted.', ConnectionResetError(104, 'Connection reset by peer'))", False),
        ("RuntimeError", "Data processing error: Connection reset by peer", False),
        ("BrokenPipeError", "[Errno 32] Broken pipe", False),
        ("StorageOutage", "s3://b/x cannot be reached for now: Read timeout on endpoint", False),
    ],
)
def test_who_broke_the_line(kind: str, message: str, is_peers: bool) -> None:
    assert is_of_a_peer(kind, message) is is_peers


def test_an_error_that_says_nothing_is_reported_too(run_dir: Path) -> None:
    leave(run_dir, {}, rank_0=AssertionError())
    failure = build_failure(Sources(run_dir, 1, outcome("AssertionError: ", 0)))
    assert (failure.kind, failure.rank) == (FailureKind.EXCEPTION, 0)
    assert "AssertionError" in failure.signature


def test_a_signature_does_not_name_the_rank(run_dir: Path, tmp_path: Path) -> None:
    signatures = set()
    for rank in (0, 1):
        folder = tmp_path / str(rank)
        (folder / "logs" / "attempt-1").mkdir(parents=True)
        leave(folder, {}, {}, **{f"rank_{rank}": ValueError("of its own")})
        signatures.add(build_failure(Sources(folder, 1, outcome(rank=rank))).signature)
    assert len(signatures) == 1


OOM = Evidence(source="/dev/kmsg", text="Out of memory: Killed process 4711 (python)")


@pytest.mark.parametrize(
    ("exit_code", "oom_kill", "kind", "signature"),
    [
        (-9, None, FailureKind.KILLED, "killed"),
        (-9, OOM, FailureKind.OUT_OF_MEMORY_HOST, "out_of_memory_host at an unknown line in step 9"),
        (-15, OOM, FailureKind.KILLED, "killed"),
        (-11, None, FailureKind.CRASHED, "crashed SIGSEGV at user/kernel.py:3 in launch in step 9"),
    ],
)
def test_a_process_that_was_seen_to_end(
    run_dir: Path, exit_code: int, oom_kill: Evidence | None, kind: FailureKind, signature: str
) -> None:
    log_dir = leave(run_dir, {}, {}, rank_0=RuntimeError(PEER_GONE))
    if exit_code == -11:
        stack = 'Current thread 0x00000001 (most recent call first):\n  File "/home/user/kernel.py", line 3 in launch\n'
        (log_dir / "rank-1.log").write_text(
            f"Fatal Python error: Segmentation fault\n\n{stack}\nExtension modules: x\n"
        )
    sources = Sources(
        run_dir,
        1,
        outcome("the process was killed", 1),
        ends={0: ProcessEnd(1, 6.0), 1: ProcessEnd(exit_code, 5.0)},
        first=1,
        # Its last heartbeat is of an earlier step.
        progress={1: RankProgress(Phase.LOG, 9)},
        oom_kill=oom_kill,
    )
    failure = build_failure(sources)
    assert (failure.kind, failure.rank, failure.time) == (kind, 1, 5.0)
    assert (failure.phase, failure.step) == (Phase.LOG, 9)
    assert failure.signature == signature
    assert (oom_kill in failure.evidence) == (oom_kill is not None)


def test_a_rank_that_is_gone_without_a_word_is_named_and_the_rest_is_unknown(run_dir: Path) -> None:
    """As under a launcher that is not ours."""
    leave(run_dir, {}, {}, rank_0=RuntimeError(PEER_GONE))
    failure = build_failure(Sources(run_dir, 1, outcome(PEER_GONE, 0)))
    assert (failure.kind, failure.rank) == (FailureKind.UNKNOWN, 1)
    assert failure.reason.endswith("; how the process ended was not seen")


def test_a_node_whose_ranks_are_all_silent_is_lost(run_dir: Path) -> None:
    there = {"host": "there"}
    leave(run_dir, {}, {}, there, there, rank_0=RuntimeError(PEER_GONE), rank_1=RuntimeError(PEER_GONE))
    failure = build_failure(Sources(run_dir, 1, outcome(PEER_GONE, 0)))
    assert (failure.kind, failure.rank, failure.signature) == (FailureKind.LOST_NODE, 2, "lost_node")


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (UserError("shard 3 is truncated."), FailureKind.BAD_INPUT),
        (NonFiniteFailure("not finite in 5 steps"), FailureKind.NONFINITE),
        (MemoryError(), FailureKind.OUT_OF_MEMORY_HOST),
        (KeyError("x"), FailureKind.EXCEPTION),
    ],
)
def test_kinds_of_errors(run_dir: Path, error: BaseException, kind: FailureKind) -> None:
    leave(run_dir, {}, rank_0=error)
    assert build_failure(Sources(run_dir, 1, outcome())).kind is kind


def test_a_gpu_without_memory_has_a_remedy(run_dir: Path) -> None:
    leave(run_dir, {}, rank_0=torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."))
    failure = build_failure(Sources(run_dir, 1, outcome()))
    assert failure.kind is FailureKind.OUT_OF_MEMORY_GPU
    assert "batch.micro_size" in (failure.remedy or "")


def test_without_any_trace_nothing_is_made_up(run_dir: Path) -> None:
    failure = build_failure(Sources(run_dir, 1, outcome("torchrun's agent ended with status 1", None)))
    assert (failure.kind, failure.rank, failure.step, failure.where) == (FailureKind.UNKNOWN, None, None, None)
    assert failure.signature == "unknown at an unknown line in step unknown"


def test_both_forms_are_written_read_back_and_moved_aside(run_dir: Path) -> None:
    leave(run_dir, {"host": "a|b"}, rank_0=KeyError("x"))
    failure = write_failure(Sources(run_dir, 1, outcome("KeyError: 'x'")))
    assert read_failure(run_dir) == failure
    text = (run_dir / "failure.md").read_text()
    assert text.startswith("# Attempt 1 failed: exception\n\nKeyError: 'x'\n")
    assert "| 0 | first | a/b | 5 |" in text
    set_failure_aside(run_dir)
    assert read_failure(run_dir) is None
    assert not (run_dir / "failure.md").exists()
    assert read_failure(run_dir / "logs" / "attempt-1") == failure
    set_failure_aside(run_dir)


def test_the_form_is_fixed() -> None:
    """Scripts read it: whoever changes it changes ``format_version``."""
    assert " ".join(Failure.model_fields) == (
        "format_version kind signature attempt time rank phase step where collective reason remedy ranks evidence logs"
    )
    assert " ".join(RankState.model_fields) == (
        "rank role host pid phase step in_phase_s heartbeat_at collective where exit error peak_rss_gib log"
    )
    assert " ".join(FailureKind) == (
        "exception killed crashed hang out_of_memory_gpu out_of_memory_host nonfinite bad_input lost_node unknown"
    )


def test_torchs_agent_gets_the_error_in_its_own_form(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ELASTIC_ERROR_VARIABLE, str(run_dir / "error.json"))
    leave(run_dir, rank_0=KeyError("x"))
    error = json.loads((run_dir / "error.json").read_text())["message"]
    assert error["message"] == "KeyError: 'x'"
    assert error["extraInfo"]["timestamp"].isdigit()
    assert "Traceback" in error["extraInfo"]["py_callstack"]


def test_the_place_of_a_killed_rank_is_known_to_the_moment() -> None:
    progress = ProgressMemory()
    phases = Phases()
    publish_progress(phases, 3, progress.variables)
    phases.enter(Phase.TRAIN, 17)
    assert read_progress(progress.variables) == {3: (Phase.TRAIN, 17)}
    code = (
        "import os, signal\n"
        "from trainer.runtime.phases import Phase, Phases\n"
        "from trainer.faults.hang.rank_progress import publish_progress\n"
        "phases = Phases()\n"
        "publish_progress(phases, 0, os.environ)\n"
        "phases.enter(Phase.SAVE, 18)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    environment = command_environment(**progress.variables)
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=False).returncode == -9
    assert read_progress(progress.variables)[0] == (Phase.SAVE, 18)
    variables = progress.variables
    progress.close()
    assert read_progress(variables) == read_progress({}) == {}
