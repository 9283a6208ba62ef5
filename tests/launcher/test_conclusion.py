"""The last line and the exit status of a run, from what ranks and torchrun left."""

import signal
from pathlib import Path

import pytest

from launcher.conclusion import Findings, _explain, conclude, conclude_by_force, first_failure
from launcher.oom_evidence import OomWatch
from launcher.rank_exits import RankExits, RankFailure
from tests.trainer.faults.test_failure_report import PEER_GONE, leave
from trainer.faults.failure.record import FailureKind, read_failure
from trainer.run_folder.folder import RunFolder

HEAD = """W1124 13:50:56 6499 multiprocessing/api.py:1028] Sending process 6502 closing signal SIGTERM
Traceback (most recent call last):
  File "torch/distributed/launcher/api.py", line 383, in launch_agent
    raise ChildFailedError(
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
=====================================================
trainer FAILED
-----------------------------------------------------
Failures:
"""
ENTRY = """[{index}]:
  time      : 2026-11-24_13:{time}
  host      : localhost
  rank      : {rank} (local_rank: {rank})
  exitcode  : {exitcode} (pid: 6502)  (SIGKILL)
  error_file: <N/A>
  traceback : Signal 9 (SIGKILL) received by PID 6502
"""
ROOT_CAUSE = """-----------------------------------------------------
Root Cause (first observed failure):
"""


def report(root: tuple[str, int, int], *others: tuple[str, int, int]) -> str:
    """torchrun's report of failures, each as time, rank and exit code."""
    entries = [ENTRY.format(index=i, time=t, rank=r, exitcode=e) for i, (t, r, e) in enumerate((root, *others))]
    return HEAD + "".join(entries[1:]) + ROOT_CAUSE + entries[0] + "=" * 53 + "\n"


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path)
    folder.log_dir(1).mkdir(parents=True)
    return folder


def nothing_seen() -> Findings:
    """Of a process without children."""
    return Findings(RankExits(0), OomWatch(), {})


def log_of(folder: RunFolder, text: str) -> Path:
    log = folder.log_dir(1) / "launcher.log"
    log.write_text(text)
    return log


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", None),
        (report(("50:56", 1, -9)), RankFailure(1, -9)),
        # Rank 0 was ended by torchrun half a minute later.
        (report(("50:56", 1, 1), ("51:26", 0, -9)), RankFailure(1, 1)),
        # In the same second torchrun takes the lower rank, whose lost connection is the consequence.
        (report(("50:56", 0, 1), ("50:56", 1, -11)), RankFailure(1, -11)),
        (report(("50:56", 1, 1), ("50:56", 0, -15)), RankFailure(1, 1)),
        # The watchdog of a rank that waits for another aborts it.
        (report(("50:56", 0, 1), ("50:56", 1, -6)), RankFailure(0, 1)),
        # Rank 0 lost its peer and said so in the second before the agent looked.
        (report(("50:56", 0, 1), ("50:57", 1, -9)), RankFailure(1, -9)),
        (report(("50:56", 0, 1), ("51:02", 1, -9)), RankFailure(0, 1)),
    ],
)
def test_first_failure(text: str, expected: RankFailure | None) -> None:
    assert first_failure(text) == expected


def test_a_crash_is_told_and_the_others_report_before_it(folder: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    folder.write_outcome("failed", 1, 5, "RuntimeError: Connection closed by peer", 0)
    log = log_of(folder, report(("50:56", 0, 1), ("50:56", 1, -11)))
    assert conclude("torchrun's agent", 1, nothing_seen(), folder, log) == 1
    assert capsys.readouterr().err.splitlines() == [
        "rank 0 reported: RuntimeError: Connection closed by peer",
        f"logs: {log}",
        f"report: {folder.path / 'failure.md'}",
        "error: rank 1: the process was killed by SIGSEGV",
    ]
    outcome = folder.read_outcome()
    assert outcome is not None
    assert (outcome["rank"], outcome["step"], outcome["reason"]) == (1, 5, "the process was killed by SIGSEGV")


def test_a_kill_that_only_the_agent_saw(folder: RunFolder) -> None:
    """On a busy machine the agent may look at a rank that was killed before the launcher does."""
    leave(folder.path, {}, {}, rank_0=RuntimeError(PEER_GONE))
    folder.write_outcome("failed", 1, 5, PEER_GONE, 0)
    log = log_of(folder, report(("50:56", 0, 1), ("50:57", 1, -9)))
    assert conclude("torchrun's agent", 1, nothing_seen(), folder, log) == 1
    failure = read_failure(folder.path)
    assert failure is not None
    assert (failure.kind, failure.rank, failure.signature) == (FailureKind.KILLED, 1, "killed")
    assert any("rank 1 ended with SIGKILL at 13:50:57" in evidence.text for evidence in failure.evidence)


def test_a_mapped_file_that_was_cut_short(tmp_path: Path) -> None:
    sentence = _explain("torchrun's agent", 1, RankFailure(1, -signal.SIGBUS), tmp_path / "log", None)
    assert sentence.startswith("the process was killed by SIGBUS: a file that it had mapped, such as a shard")


def test_what_a_rank_reported_of_itself_stays(folder: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    folder.write_outcome("failed", 1, 5, "RuntimeError: of its own", 1)
    assert (
        conclude(
            "torchrun's agent", 1, nothing_seen(), folder, log_of(folder, report(("50:56", 1, 1), ("51:02", 0, -9)))
        )
        == 1
    )
    assert capsys.readouterr().err.splitlines()[-1] == "error: rank 1: RuntimeError: of its own"


def test_bad_input_outranks_a_crash(folder: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    folder.write_outcome("bad_input", 2, 0, "shard 3 is truncated; prepare it again.", 0)
    assert conclude("torchrun's agent", 1, nothing_seen(), folder, log_of(folder, report(("50:56", 1, -11)))) == 2
    assert capsys.readouterr().err == "error: shard 3 is truncated; prepare it again.\n"


def test_a_crash_after_all_was_saved_is_a_note(folder: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    folder.write_outcome("finished", 0, 6, "all steps done")
    log = log_of(folder, report(("50:56", 1, -11)))
    assert conclude("torchrun's agent", 1, nothing_seen(), folder, log) == 0
    captured = capsys.readouterr()
    assert captured.err == f"note: rank 1 was killed by SIGSEGV after all was saved; see {log}\n"
    assert captured.out == f"finished at step 6: {folder.path}\n"


def test_a_run_that_ends_before_its_last_step_says_why(folder: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    folder.write_outcome("finished", 0, 4, "stopped early: eval/loss has not improved in 2 evaluations")
    assert conclude("torchrun's agent", 0, nothing_seen(), folder, log_of(folder, "")) == 0
    first, last = capsys.readouterr().out.splitlines()
    assert first == "stopped early: eval/loss has not improved in 2 evaluations"
    assert last == f"finished at step 4: {folder.path}"


def test_ranks_that_end_with_75_are_no_failure(folder: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    folder.write_outcome("stopped", 75, 4, "stopped on request")
    assert conclude("torchrun's agent", 1, nothing_seen(), folder, log_of(folder, report(("50:56", 1, 75)))) == 75
    captured = capsys.readouterr()
    assert captured.err == ""
    assert captured.out == "stopped at step 4, saved; run the same command again to continue\n"


def test_an_unreported_error_is_found_in_the_ranks_own_log(
    folder: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    own_log = folder.log_dir(1) / "rank-1.log"
    own_log.write_text("Traceback (most recent call last):\n  x\nOSError: [Errno 28] No space left on device\n")
    assert conclude("torchrun's agent", 1, nothing_seen(), folder, log_of(folder, report(("50:56", 1, 1)))) == 1
    assert capsys.readouterr().err.splitlines() == [
        f"logs: {own_log}",
        f"report: {folder.path / 'failure.md'}",
        "error: rank 1: OSError: [Errno 28] No space left on device",
    ]


def test_an_agent_that_could_not_start(folder: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    log = log_of(folder, "Traceback (most recent call last):\ntorch.distributed.DistNetworkError: the port is in use\n")
    assert conclude("torchrun's agent", 1, nothing_seen(), folder, log) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "error: torch.distributed.DistNetworkError: the port is in use"


def test_an_end_by_force_names_the_step_to_continue_from(folder: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    (folder.checkpoint_path(4)).mkdir(parents=True)
    (folder.checkpoint_path(4) / "manifest.json").write_text("{}")
    assert conclude_by_force(folder) == 130
    assert capsys.readouterr().err == (
        "error: ended at once by a second signal; the same command continues after step 4\n"
    )
    outcome = folder.read_outcome()
    assert outcome is not None
    assert (outcome["status"], outcome["exit_code"], outcome["step"]) == ("failed", 130, 4)
