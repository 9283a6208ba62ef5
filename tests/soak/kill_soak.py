"""Random SIGKILLs over one run, until it ends with 0; then it must be bit for bit the run that nobody disturbed.

``python -m tests.soak.kill_soak --folder DIR [--kills 200] [--minutes 30] [CONFIG] [key=value ...]``

Without CONFIG a tiny run is soaked that has everything there is to keep: dropout, fp16's loss scale, a mixture, an
average of the weights, evaluation. A rank, the launcher or its agent is killed, at any moment: while processes start,
a checkpoint is loaded, a step is taken, metrics are written, a checkpoint is saved. A launcher that is left restarts
its ranks once (``faults.max_restarts=1``); one that has ended is started again. When the sitting is over, or was
killed itself, the same command goes on. Each kill is a line of ``DIR/kills.jsonl``; victim and moment of the n-th are
drawn from (seed, n) and depend on how far the run is.
"""

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from launcher.child import start_child
from launcher.drills.observed_run import ObservedRun
from sharding.ranks.errors import EXIT_FINISHED
from tests.soak.kill_log import NO_RANKS, KillLog
from tests.soak.kill_plan import Plan, plan_kill
from tests.soak.tiny_run import tiny_config
from tests.support import (
    ROOT,
    command_environment,
    kill,
    processes_of,
    rank_processes,
    wait_until,
)
from trainer.faults.failure.record import FailureKind, read_failure
from trainer.faults.hang.heartbeat import read_heartbeats
from trainer.run_folder.folder import RunFolder
from trainer.run_folder.provenance import code_revision

_STEPS_PER_KILL = 20
_FIRST_GUESS_OF_START_S = 10.0
_LOOK_EVERY_S = 0.02
_SETTLES_WITHIN_S = 120.0
_BEATS_WITHIN_S = 2.0
_STEP = re.compile(r" INFO step (\d+)/")


class SoakFailure(Exception):
    """The run did what it must not do."""


class KillSoak:
    """One run that is killed again and again."""

    def __init__(self, folder: Path, config: Path, settings: list[str], *, kills: int, seed: int, nproc: int) -> None:
        """Take up where the last sitting ended."""
        self._folder, self._config, self._settings = folder, config, settings
        self._num_kills, self._seed, self._nproc = kills, seed, nproc
        self._num_steps = kills * _STEPS_PER_KILL
        self._run = RunFolder(folder / "runs" / "killed")
        self.log = KillLog(folder / "kills.jsonl")
        self._launcher: subprocess.Popen[bytes] | None = None
        self._start_up_s = _FIRST_GUESS_OF_START_S
        self._killed_at: float | None = None

    def sit(self, minutes: float) -> bool:
        """Kill until all is done or the time is up; returns whether all is done.

        Raises:
            SoakFailure: the run failed by itself, left processes behind, or ended otherwise than the undisturbed one.
        """
        until = time.monotonic() + 60 * minutes
        self.log.add("sitting", revision=code_revision().get("git_revision", "none"))
        self._train_undisturbed()
        while len(self.log.kills) < self._num_kills:
            if time.monotonic() > until:
                return False
            self._strike(len(self.log.kills) + 1)
        self._finish()
        return True

    def close(self) -> None:
        """Leave nothing running; the next sitting goes on from the last checkpoint."""
        if self._launcher is not None and self._launcher.poll() is None:
            self._launcher.kill()
            self._launcher.wait()

    def _command(self, name: str) -> list[str]:
        settings = [*self._settings, f"steps={self._num_steps}", f"schedule.total_steps={self._num_steps}"]
        places = [f"output_dir={self._folder / 'runs'}", f"name={name}", "metrics.every_steps=1"]
        restarts = ["faults.max_restarts=1", "faults.restart_backoff_s=0.2", "tracking.wandb.mode=disabled"]
        arguments = [str(self._config), *settings, *places, *restarts, f"--nproc-per-node={self._nproc}"]
        return [sys.executable, "-m", "launcher", "run", *arguments]

    def _train_undisturbed(self) -> None:
        with (self._folder / "undisturbed.log").open("ab") as output:
            ended = subprocess.run(
                self._command("undisturbed"),
                cwd=ROOT,
                env=command_environment(),
                stdout=output,
                stderr=output,
                check=False,
            )
        if ended.returncode != EXIT_FINISHED:
            raise SoakFailure(f"the undisturbed run ended with {ended.returncode}; see {self._folder}/undisturbed.log")

    def _start(self) -> None:
        if self._launcher is not None and self._launcher.poll() is None:
            return
        with (self._folder / "killed.log").open("ab") as output:
            # In its environment is nothing of ours but this checkout; it ends with us.
            self._launcher = start_child(
                self._command("killed"), command_environment(), shielded=False, cwd=ROOT, stdout=output, stderr=output
            )
        self.log.add("run")

    def _strike(self, number: int) -> None:
        before, begun_at = self._run.newest_attempt(), time.monotonic()
        is_new = self._launcher is None or self._launcher.poll() is not None
        self._start()
        saved = self._saved_step()
        plan = plan_kill(
            self._seed,
            number,
            num_ranks=self._nproc,
            steps_left=self._num_steps - saved,
            kills_left=self._num_kills - number + 1,
            start_up_s=self._start_up_s,
        )
        self._wait_for(plan, begun_at, before + 1 if is_new else before)
        self._kill(plan, number, begun_at)

    def _wait_for(self, plan: Plan, begun_at: float, attempt: int) -> None:
        """Wait for a kill's moment; ``attempt`` is the one that is running or about to."""
        if plan.num_steps is not None:
            target = self._saved_step() + plan.num_steps
            while True:
                step = self._step_of(attempt)
                if step is not None:
                    self._note_recovery(begun_at)
                if step is not None and step >= target:
                    break
                self._expect_running(attempt)
                time.sleep(_LOOK_EVERY_S)
            begun_at = time.monotonic()
        while time.monotonic() < begun_at + plan.delay_s:
            self._expect_running(attempt)
            time.sleep(_LOOK_EVERY_S)

    def _expect_running(self, attempt: int) -> None:
        assert self._launcher is not None
        if self._launcher.poll() is not None:
            raise SoakFailure(f"shardline run ended with {self._launcher.returncode}, though nobody had killed it")
        if self._run.newest_attempt() > attempt:
            raise SoakFailure(f"attempt {attempt} was followed by another, though nobody had killed it")

    def _note_recovery(self, begun_at: float) -> None:
        if self._killed_at is not None:
            self._start_up_s = time.monotonic() - begun_at
            number = len(self.log.kills)
            self.log.add("recovered", number=number, recovery_s=round(time.time() - self._killed_at, 2))
            self._killed_at = None

    def _kill(self, plan: Plan, number: int, begun_at: float) -> None:
        assert self._launcher is not None
        attempt, log_dir = self._run.newest_attempt(), self._run.log_dir(self._run.newest_attempt())
        victim, pid = self._find(plan.victim)
        beat = read_heartbeats(log_dir).get(0)
        is_saving = self._is_saving(beat.time if beat is not None else None)
        self._killed_at, after_s = time.time(), time.monotonic() - begun_at
        try:
            kill(pid)
        except ProcessLookupError:
            raise SoakFailure(f"{victim} had ended, though nobody had killed it") from None
        exit_code = self._settle(victim, attempt)
        failure = read_failure(self._run.path) or read_failure_of(self._run, attempt)
        is_rank = victim.startswith("rank")
        # What the report says is of the very moment; a heartbeat is up to a second old.
        phase, step = (str(beat.phase), beat.step) if beat is not None else (NO_RANKS, 0)
        if is_rank and failure is not None and failure.phase is not None:
            phase, step = str(failure.phase), failure.step or 0
        self.log.add(
            "kill",
            number=number,
            victim=victim,
            attempt=attempt,
            after_s=round(after_s, 2),
            phase=phase,
            step=step,
            is_saving=is_saving,
            saved_step=self._saved_step(),
            exit_code=exit_code,
            is_named=is_rank
            and failure is not None
            and (failure.kind, failure.rank) == (FailureKind.KILLED, int(victim.partition("-")[2])),
        )

    def _find(self, wanted: str) -> tuple[str, int]:
        """The victim and its process; the launcher where there is no such process yet."""
        assert self._launcher is not None
        if wanted.startswith("rank"):
            ranks = rank_processes(self._run.path)
            if (rank := int(wanted.partition("-")[2])) in ranks:
                return wanted, ranks[rank]
        if wanted != "launcher":
            # Also before it has become torchrun, and while there are no ranks yet.
            agents = [pid for pid, argv in processes_of(self._run.path).items() if "torch.distributed.run" in argv]
            if agents:
                return "agent", agents[0]
        return "launcher", self._launcher.pid

    def _settle(self, victim: str, attempt: int) -> int | None:
        """Wait for what follows from a kill: the launcher's end with a status, or another attempt (None)."""
        launcher = self._launcher
        assert launcher is not None
        if victim == "launcher":
            launcher.wait()
        wait_until(
            lambda: launcher.poll() is not None or self._run.newest_attempt() > attempt,
            _SETTLES_WITHIN_S,
            f"the end of attempt {attempt}, whose {victim} was killed,",
        )
        if launcher.poll() is None:
            return None
        if launcher.returncode == EXIT_FINISHED:
            raise SoakFailure(f"the run ended although {victim} was killed, before the last kill")
        # Nothing may be left that could still write.
        wait_until(lambda: not self._left_over(), 10, "the end of all processes")
        return launcher.returncode

    def _left_over(self) -> dict[int, list[str]]:
        # Not whoever looks at the folder, or started this.
        ours = {"launcher", "launcher.child", "torch.distributed.run", "trainer"}
        return {pid: argv for pid, argv in processes_of(self._run.path).items() if ours & set(argv)}

    def _finish(self) -> None:
        """To the end, and the comparison."""
        self._start()
        assert self._launcher is not None
        status = self._launcher.wait()
        if status != EXIT_FINISHED:
            raise SoakFailure(f"shardline run ended with {status}, though nobody had killed it")
        killed, undisturbed = (
            ObservedRun(str(self._config), [], RunFolder(self._folder / "runs" / name), self._nproc)
            for name in ("killed", "undisturbed")
        )
        state, expected = killed.final_state(), undisturbed.final_state()
        steps = [line["step"] for line in killed.lines()]
        checks = {
            "parameters, optimizer, average and scaler are bit for bit the same": state["files"] == expected["files"],
            "samples, tokens and skipped steps are the same": state == expected,
            "metrics.jsonl holds each step once": steps == list(range(1, self._num_steps + 1)),
            "every step has the same loss, gradient norm, rate and tokens": killed.curve() == undisturbed.curve(),
        }
        self.log.add("compared", steps=self._num_steps, attempts=self._run.newest_attempt(), checks=checks)
        if not all(checks.values()):
            raise SoakFailure(f"not the undisturbed run: {[claim for claim, holds in checks.items() if not holds]}")

    def _saved_step(self) -> int:
        newest = self._run.newest_checkpoint()
        return 0 if newest is None else newest[0]

    def _is_saving(self, beat_at: float | None) -> bool:
        """Whether a checkpoint is being written: its files are there, its manifest is not.

        What an earlier kill has left of one is as old as that kill, and the heartbeat is of this attempt.
        """
        if beat_at is None:
            return False
        for folder in self._run.checkpoints_dir.glob("step-*"):
            with contextlib.suppress(OSError):
                if not (folder / "manifest.json").exists() and folder.stat().st_mtime > beat_at - _BEATS_WITHIN_S:
                    return True
        return False

    def _step_of(self, attempt: int) -> int | None:
        """The last step that an attempt has logged; None before its first."""
        try:
            with (self._run.log_dir(attempt) / "rank-0.log").open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 2000))
                steps = _STEP.findall(file.read().decode(errors="replace"))
        except OSError:
            return None
        return int(steps[-1]) if steps else None


def read_failure_of(run: RunFolder, attempt: int) -> Any:
    """The report of an attempt that another has followed."""
    return read_failure(run.log_dir(attempt))


def main() -> int:
    """The command; returns its exit status: 0 all done and equal, 75 more to come, 1 a failure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", type=Path, help="configuration of the run; a tiny one without it")
    parser.add_argument("settings", nargs="*", help="key=value arguments")
    parser.add_argument("--folder", type=Path, required=True, help="where all is kept, and where to go on")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=600.0, help="length of this sitting")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--nproc-per-node", type=int, default=2)
    chosen = parser.parse_args()
    folder = chosen.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    soak = KillSoak(
        folder,
        chosen.config.resolve() if chosen.config else tiny_config(folder),
        chosen.settings,
        kills=chosen.kills,
        seed=chosen.seed,
        nproc=chosen.nproc_per_node,
    )
    try:
        is_done = soak.sit(chosen.minutes)
    except (SoakFailure, AssertionError) as error:
        soak.log.add("failed", reason=str(error))
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        soak.close()
        summary = soak.log.summary()
        (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        print(json.dumps(summary, indent=2))
    return 0 if is_done else 75


if __name__ == "__main__":
    sys.exit(main())
