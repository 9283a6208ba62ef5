"""One run of a drill: started as a person would start it, watched from outside, compared with the undisturbed one."""

import json
import math
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher.child import start_child
from launcher.import_path import module_command
from sharding.ranks.errors import EXIT_FINISHED
from trainer.run_folder.events import read_events
from trainer.run_folder.folder import RunFolder

_LOOK_EVERY_S = 0.1
_GIVE_UP_AFTER_S = 600.0
# What training computed; times and bytes are left out.
_CURVE = ("step", "train/loss", "train/grad_norm", "train/learning_rate", "train/tokens")


@dataclass(frozen=True)
class Ended:
    """How one ``shardline run`` ended.

    Attributes:
        exit_code: its exit status.
        text: what it printed.
        at: when it ended, wall clock in seconds.
    """

    exit_code: int
    text: str
    at: float


@dataclass
class ObservedRun:
    """A run in a folder of its own, and when each of its steps was first seen in metrics.jsonl.

    Attributes:
        config: configuration file.
        settings: ``key=value`` arguments; they name the run's folder too.
        folder: the run's folder.
        nproc_per_node: ranks, or None for the configuration's own number.
        ended: every ``shardline run`` so far.
        seen: each line of metrics.jsonl that was ever there, and when it was first seen, wall clock in seconds.
    """

    config: str
    settings: Sequence[str]
    folder: RunFolder
    nproc_per_node: int | None
    ended: list[Ended] = field(default_factory=list)
    seen: dict[str, float] = field(default_factory=dict)

    def run(
        self,
        *,
        extra: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        when: Callable[[], bool] | None = None,
        then: Callable[[int], None] | None = None,
        **options: Any,
    ) -> Ended:
        """One ``shardline run`` to its end.

        Args:
            extra: further settings.
            environment: further variables.
            when: a condition that is looked at ten times a second.
            then: called once with the process id when the condition holds.
            options: of ``subprocess.Popen``.
        """
        command = module_command("launcher", "run", self.config, *self.settings, *extra)
        if self.nproc_per_node is not None:
            command.append(f"--nproc-per-node={self.nproc_per_node}")
        log = self.folder.path.parent / f"{self.folder.path.name}.log"
        start = log.stat().st_size if log.exists() else 0
        with log.open("ab") as output:
            process = start_child(
                command,
                {**os.environ, **(environment or {})},
                shielded=False,
                stdout=output,
                stderr=subprocess.STDOUT,
                **options,
            )
            deadline = time.monotonic() + _GIVE_UP_AFTER_S
            while process.poll() is None:
                self._look()
                if then is not None and (when is None or when()):
                    then(process.pid)
                    then = None
                if time.monotonic() > deadline:
                    process.send_signal(signal.SIGKILL)
                time.sleep(_LOOK_EVERY_S)
        self._look()
        text = log.read_bytes()[start:].decode(errors="replace")
        self.ended.append(Ended(process.returncode, text, time.time()))
        return self.ended[-1]

    def run_until_finished(self, *, at_most: int = 4, **arguments: Any) -> Ended:
        """The same command again and again, as a person or a batch system would, until it ends with 0."""
        for _ in range(at_most):
            ended = self.run(**arguments)
            if ended.exit_code == EXIT_FINISHED:
                break
        return self.ended[-1]

    def has_reached(self, step: int) -> bool:
        """Whether a step was logged."""
        return any(line["step"] >= step for line in self.lines())

    def events(self, kind: str) -> list[dict[str, Any]]:
        """The run's events of a kind."""
        return [event for event in read_events(self.folder.path) if event["kind"] == kind]

    def lines(self) -> list[dict[str, Any]]:
        """The complete lines of metrics.jsonl."""
        return [json.loads(text) for text in self._texts()]

    def curve(self) -> list[tuple[Any, ...]]:
        """What training computed at each logged step."""
        return [tuple(line.get(name) for name in _CURVE) for line in self.lines()]

    def final_state(self) -> dict[str, Any]:
        """Checksums of the last checkpoint's files, and its counters."""
        newest = self.folder.newest_checkpoint()
        if newest is None:
            return {}
        manifest = json.loads((newest[1] / "manifest.json").read_bytes())
        training = manifest["training"]
        return {
            "files": {name: entry["sha256"] for name, entry in sorted(manifest["files"].items())},
            **{name: training[name] for name in ("step", "num_samples", "num_tokens", "num_skipped_steps")},
        }

    def failure(self, attempt: int) -> dict[str, Any]:
        """The failure report of an attempt; empty where there is none."""
        for folder in (self.folder.log_dir(attempt), self.folder.path):
            report = _read_json(folder / "failure.json")
            if report.get("attempt") == attempt:
                return report
        return {}

    def alarm(self, attempt: int) -> dict[str, Any]:
        """What the watchdogs of an attempt raised the alarm about; empty where they did not."""
        return _read_json(self.folder.log_dir(attempt) / "alarm.json")

    def triggered_at(self) -> float:
        """When the first fault was triggered, wall clock in seconds; infinity where none was."""
        return min((event["time"] for event in self.events("injected")), default=math.inf)

    def noticed_at(self) -> float | None:
        """When the launcher had reported a failure: it said that it restarts, or it ended."""
        times = [event["time"] for event in self.events("restart")] + [ended.at for ended in self.ended]
        return min(times, default=None)

    def first_seen(self, *, after: float) -> float | None:
        """When, after a moment, the first step was logged; wall clock in seconds."""
        return min((at for at in self.seen.values() if at > after), default=None)

    def start_up_s(self, began_at: float) -> float:
        """Seconds from a moment at which an attempt began to its first step; 0 where it has logged none."""
        return (self.first_seen(after=began_at) or began_at) - began_at

    def _texts(self) -> list[str]:
        try:
            text = self.folder.metrics_file.read_text()
        except FileNotFoundError:
            return []
        return [line for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def _look(self) -> None:
        # A step that is trained again has another throughput, so its line is another.
        for text in self._texts():
            self.seen.setdefault(text, time.time())


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
