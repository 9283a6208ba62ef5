"""``slurm/job.sh`` by itself: the real script over stand-ins of srun, scontrol and ranks.

What Slurm really does with it is in ``tests/slurm``, which needs root.
"""

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.support import ROOT, wait_until

pytestmark = pytest.mark.timeout(60)

_SRUN = """\
echo "srun $*" >> calls
while [[ $1 == --* ]]; do shift; done
exec "$@"
"""
# Slurm kills the batch script of a job that it requeues.
_SCONTROL = """\
echo "scontrol $*" >> calls
case "$1 $*" in
    *--oneliner*) echo " JobId=7 JobState=RUNNING Reason=$(cat reason) ExcNodeList=(null) Requeue=1" ;;
    "requeue "*) [[ ! -e forbids-requeue ]] && kill -9 $PPID ;;
esac
"""
# An attempt: it removes what the one before has left, takes a step each tenth of a second, and says how it ended.
_PYTHON = """\
case $2 in
    launcher.slurm.job) cat exports ;;
    launcher.slurm.restart) cat restart-exports; exit "$(cat restart-status)" ;;
    launcher.slurm.node)
        sleep 0.2
        echo "$MASTER_PORT" >> ports
        step=$(cat run/step 2> /dev/null || echo 0)
        rm -f run/stop run/outcome.json
        echo begun >> run/starts
        [[ ! -e dies ]] || exit 9
        end() {
            echo "$step" > run/step
            printf '{"status": "%s", "exit_code": %s, "step": %s, "reason": "%s"}' "$1" "$2" "$step" "$3" > run/new
            mv run/new run/outcome.json
            exit "$2"
        }
        while ((step < $(cat num-steps))); do
            [[ ! -e fails ]] || { rm fails; end failed 1 "a wrong number"; }
            [[ ! -e run/stop ]] || end stopped 75 "stopped by $(cat run/stop)"
            sleep 0.1
            [[ -e idle ]] || step=$((step + 1))
        done
        end finished 0 "all steps done" ;;
esac
"""


class Job:
    """A job in a folder; each start of it is a batch script of its own, as Slurm has it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run_dir = folder / "run"
        self.num_starts = 0
        self.script: subprocess.Popen[str] | None = None
        self.run_dir.mkdir()
        for name, text in (("srun", _SRUN), ("scontrol", _SCONTROL), ("python", _PYTHON)):
            (folder / name).write_text(f"#!/bin/bash\n{text}")
            (folder / name).chmod(0o755)
        (folder / "batch").write_text(
            f"#!/bin/bash\nset -euo pipefail\ncontainer=()\ninside=()\nsource {ROOT}/slurm/job.sh\n"
            'prepare torchrun\nrun_step 1 "$SHARDLINE_PYTHON" -m launcher.slurm.node torchrun "${arguments[@]}"\n'
        )
        exports = {"run_dir": self.run_dir, "config_file": "frozen.yaml", "MASTER_PORT": 12000, "max_restarts": 0}
        self.write("exports", "".join(f"export {name}={value}\n" for name, value in exports.items()))
        self.write("restart-exports", "export MASTER_PORT=12001\n")
        self.write("restart-status", "0\n")
        self.write("num-steps", "400\n")
        self.write("reason", "None\n")

    def write(self, name: str, text: str = "") -> None:
        (self.folder / name).write_text(text)

    def calls(self, program: str) -> list[str]:
        path = self.folder / "calls"
        return [line for line in path.read_text().splitlines() if line.startswith(program)] if path.exists() else []

    def start(self, **extra: str) -> None:
        """Start it, for the first time or again."""
        restarts = {"SLURM_RESTART_COUNT": str(self.num_starts)} if self.num_starts else {}
        self.num_starts += 1
        environment = {
            "PATH": f"{self.folder}:{os.environ['PATH']}",
            "SHARDLINE_PYTHON": "python",
            "SLURM_CPUS_ON_NODE": "8",
            "SLURM_TASKS_PER_NODE": "1(x2)",
            "SLURM_JOB_ID": "7",
            "SLURM_NNODES": "2",
        }
        self.script = subprocess.Popen(
            ["bash", "batch", "c.yaml"],
            cwd=self.folder,
            env=environment | restarts | extra,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def wait_for_attempt(self) -> None:
        """Wait until the newest start's ranks are up, and have removed what the attempt before has left."""
        starts = self.run_dir / "starts"
        wait_until(
            lambda: starts.exists() and len(starts.read_text().split()) >= self.num_starts, 10, what="an attempt"
        )

    def signal(self, number: signal.Signals = signal.SIGUSR1) -> None:
        assert self.script is not None
        self.script.send_signal(number)

    def end(self) -> tuple[int, str]:
        """Exit status and output of a start; -9 where the job was requeued."""
        assert self.script is not None
        output, _ = self.script.communicate(timeout=20)
        return self.script.returncode, output


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    started = Job(tmp_path)
    yield started
    if started.script is not None and started.script.poll() is None:
        os.killpg(started.script.pid, signal.SIGKILL)


def _outcome(job: Job) -> dict[str, object]:
    return json.loads((job.run_dir / "outcome.json").read_text())


@pytest.mark.timing
def test_every_start_of_a_job_hears_its_warning(job: Job) -> None:
    for _ in range(3):
        job.start()
        job.wait_for_attempt()
        time.sleep(0.3)
        job.signal()
        status, output = job.end()
        assert status == -signal.SIGKILL, output
        assert "the run saves and stops" in output
        assert _outcome(job)["reason"] == "stopped by signal SIGUSR1 to the batch script"
    job.write("num-steps", str(int(str(_outcome(job)["step"])) + 2))
    job.start()
    status, output = job.end()
    assert (status, _outcome(job)["status"]) == (0, "finished"), output
    assert job.calls("scontrol requeue") == ["scontrol requeue 7"] * 3


def test_a_warning_while_the_next_attempt_is_beginning_is_not_lost(job: Job) -> None:
    job.write("run/outcome.json", '{"status": "stopped", "exit_code": 75, "step": 3, "reason": "", "rank": 0}')
    job.start()
    wait_until(lambda: any("launcher.slurm.node" in call for call in job.calls("srun")), 10, what="the step")
    job.signal(signal.SIGTERM)
    status, output = job.end()
    # Slurm's own end, of a job that is still running: it is requeued.
    assert (status, _outcome(job)["exit_code"]) == (-signal.SIGKILL, 75), output


def test_a_persons_stop_ends_the_job(job: Job) -> None:
    job.start()
    job.wait_for_attempt()
    job.write("run/stop", "a person")
    status, output = job.end()
    assert (status, output.splitlines()[-1].partition(" at step")[0]) == (75, "job 7: stopped")
    assert job.calls("scontrol requeue") == []


def test_starts_that_come_to_nothing_have_an_end(job: Job) -> None:
    job.write("idle")
    for number in range(3):
        job.start()
        job.wait_for_attempt()
        job.signal()
        status, output = job.end()
        assert status == (-signal.SIGKILL if number < 2 else 75), output
    assert (
        "job 7: not started again: 3 starts in a row ended at step 0, so that another would come to nothing too; give "
        "it more time (--time)" in output
    )
    # Whoever submits it again begins to count again.
    job.num_starts = 0
    (job.run_dir / "starts").unlink()
    job.start()
    job.wait_for_attempt()
    job.signal()
    assert job.end()[0] == -signal.SIGKILL


def test_an_attempt_that_could_not_say_how_it_ended_is_no_wrong_input(job: Job) -> None:
    job.write("run/outcome.json", '{"status": "stopped", "exit_code": 75, "step": 3, "reason": "", "rank": 0}')
    job.write("dies")
    job.start()
    status, output = job.end()
    assert (status, output.splitlines()[-1]) == (
        9,
        "job 7: the step ended with status 9, and no rank could say how the run ended",
    )


def test_of_what_a_step_prints_only_assignments_are_taken_over(job: Job) -> None:
    path = job.run_dir.with_name("it's a $(touch evaluated) run")
    job.run_dir.rename(path)
    job.run_dir = path
    (job.folder / "run").symlink_to(path)
    exports = (job.folder / "exports").read_text().partition("\n")[2]
    quoted = str(path).replace("'", "'\"'\"'")
    job.write(
        "exports",
        f"Welcome to the cluster; touch evaluated\ntouch evaluated\nexport SEEN=$(touch evaluated)\n"
        f"export SEEN=1; touch evaluated\nexport run_dir='{quoted}'\n{exports}export max_restarts=0",
    )
    job.write("num-steps", "2")
    job.start()
    status, output = job.end()
    assert status == 0, output
    assert not (job.folder / "evaluated").exists()
    assert "Welcome to the cluster" in output
    assert output.splitlines()[-1] == "job 7: finished at step 2: all steps done"
    assert job.calls("srun")[-1].endswith(" -m launcher.slurm.node torchrun frozen.yaml")


@pytest.mark.parametrize(
    ("restart_status", "ports", "last"), [("0", ["12000", "12001"], (0, "finished")), ("1", ["12000"], (1, "failed"))]
)
def test_a_restart_meets_where_it_is_told_to(
    job: Job, restart_status: str, ports: Sequence[str], last: tuple[int, str]
) -> None:
    job.write("exports", (job.folder / "exports").read_text().replace("max_restarts=0", "max_restarts=1"))
    job.write("restart-status", restart_status)
    job.write("num-steps", "2")
    job.write("fails")
    job.start()
    status, output = job.end()
    assert (status, _outcome(job)["status"]) == last, output
    assert (job.folder / "ports").read_text().split() == ports


@pytest.mark.parametrize(
    ("container", "own", "expected"),
    [("", "", "{host}"), ("--container-image=x", "", "python"), ("--container-image=x", "/opt/python", "/opt/python")],
)
def test_the_hosts_python_is_not_looked_for_in_a_container(job: Job, container: str, own: str, expected: str) -> None:
    batch = (job.folder / "batch").read_text()
    job.write("batch", batch.replace("container=()", f"container=({container})"))
    job.write("num-steps", "0")
    host = job.folder / "host-python"
    host.symlink_to("python")
    job.start(SHARDLINE_PYTHON=own, SHARDLINE_HOST_PYTHON=str(host))
    status, output = job.end()
    (first, *_) = job.calls("srun")
    assert f" {container}{' ' if container else ''}{expected.format(host=host)} -m launcher.slurm.job" in first
    assert status == (127 if own else 0), output


def test_where_requeue_is_forbidden_a_successor_follows(job: Job) -> None:
    job.write("forbids-requeue")
    job.write("submit.sh", 'echo "successor $SHARDLINE_IS_SUCCESSOR $*" >> calls\n')
    job.start(SHARDLINE_RESUBMIT=str(job.folder / "submit.sh"))
    job.wait_for_attempt()
    job.signal()
    assert job.end()[0] == 75
    assert job.calls("successor") == ["successor 1 --dependency=afterany:7"]
