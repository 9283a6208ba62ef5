"""Where a drill takes place: a short run that nothing disturbs, and beside it the one in which a fault is triggered."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from launcher.drills.observed_run import ObservedRun
from launcher.drills.outcome import Outcome
from launcher.plan import make_plan
from sharding.ranks.errors import EXIT_FINISHED, RunFailure, UserError
from trainer.config import RunConfig
from trainer.config.short_runs import UNJUDGED, beginning_of_schedule
from trainer.faults.injection.inject import INJECT_VARIABLE
from trainer.files.atomic_files import write_atomically
from trainer.run_folder.folder import RunFolder

STEPS = 12
SAVE_EVERY = 4
# Behind a checkpoint, so that steps are lost and trained again.
TRIGGER_STEP = 7
_MARKER = "drill.json"
_DETECT_WITHIN_S = 10.0
_RECOVER_WITHIN_S = 30.0


@dataclass
class Stage:
    """What all drills work with.

    Attributes:
        config_path: configuration file of the run.
        overrides: the user's own settings; they win.
        nproc_per_node: ranks, or None for the configuration's own number.
        folder: where runs and results go.
    """

    config_path: str
    overrides: Sequence[str]
    nproc_per_node: int | None
    folder: Path
    _told: dict[str, ObservedRun] = field(default_factory=dict)

    @cached_property
    def config(self) -> RunConfig:
        """The run's configuration with a drill's settings."""
        return self._plan(self._settings("plan")).config

    @cached_property
    def num_ranks(self) -> int:
        """Ranks of the run."""
        return self._plan(self._settings("plan")).world.num_ranks

    @property
    def victim(self) -> int:
        """The rank on which a fault is triggered: the last, since rank 0 is the special one."""
        return self.num_ranks - 1

    @property
    def undisturbed(self) -> ObservedRun:
        """The run without a fault and further settings.

        Raises:
            RunFailure: it does not finish.
        """
        return self.told("undisturbed")

    def told(self, name: str, *settings: str) -> ObservedRun:
        """A run without a fault, with further settings, trained to its end; of one name once for all drills.

        Raises:
            RunFailure: it does not finish.
        """
        if name in self._told:
            return self._told[name]
        self._told[name] = run = self._observe(name, settings)
        ended = run.run()
        if ended.exit_code != EXIT_FINISHED:
            raise RunFailure(f"the run without a fault ended with {ended.exit_code}:\n{ended.text[-2000:]}")
        return run

    def disturbed(self, name: str, *settings: str) -> ObservedRun:
        """A run in which a fault is to be triggered; nothing is started yet."""
        return self._observe(name, settings)

    def faults(self, *faults: Mapping[str, Any]) -> dict[str, str]:
        """The variables that make faults happen, each in the first attempt and on the victim unless it says other."""
        return {INJECT_VARIABLE: json.dumps([{"rank": self.victim, "step": TRIGGER_STEP, **fault} for fault in faults])}

    def compare(self, outcome: Outcome, run: ObservedRun, other: ObservedRun | None = None) -> None:
        """Claim that a run ended as another did, the undisturbed one unless given: bit for bit, each step once."""
        other = other or self.undisturbed
        states = run.final_state(), other.final_state()
        differences = [key for key in states[1] if states[0].get(key) != states[1][key]]
        outcome.expect(
            f"after step {STEPS} parameters, optimizer and counters are bit for bit those of {other.folder.path.name}",
            bool(states[1]) and not differences,
            f"differs: {', '.join(differences)}" if differences else f"{len(states[1].get('files', ()))} files equal",
        )
        steps = [line["step"] for line in run.lines()]
        outcome.expect(
            "metrics.jsonl has each step once, with the same losses",
            steps == sorted(set(steps)) and run.curve() == other.curve(),
            f"{len(steps)} steps",
        )

    def time(
        self,
        outcome: Outcome,
        run: ObservedRun,
        *,
        triggered_at: float,
        detected_at: float | None,
        deadline_s: float = 0.0,
    ) -> None:
        """Note how long it took to detect a fault and to train again, and claim that both were soon.

        Args:
            outcome: gets both.
            run: the run with the fault.
            triggered_at: when, wall clock in seconds.
            detected_at: when it was known; None where nobody noticed.
            deadline_s: seconds that have to pass before anything can be known.
        """
        again_at = run.first_seen(after=detected_at or triggered_at)
        outcome.detect_s = None if detected_at is None else detected_at - triggered_at
        outcome.recover_s = None if again_at is None else again_at - triggered_at
        limit_s = _DETECT_WITHIN_S + deadline_s
        beyond = f" beyond the deadline of {deadline_s:.1f} s" if deadline_s else ""
        outcome.expect(
            f"detected within {_DETECT_WITHIN_S:g} s{beyond}",
            outcome.detect_s is not None and outcome.detect_s <= limit_s,
            f"{outcome.detect_s:.1f} s" if outcome.detect_s is not None else "not at all",
            is_timed=outcome.detect_s is not None,
        )
        outcome.expect(
            f"training again within {_RECOVER_WITHIN_S:g} s of being detected",
            again_at is not None and again_at - (detected_at or triggered_at) <= _RECOVER_WITHIN_S,
            "not at all" if again_at is None else f"{again_at - (detected_at or triggered_at):.1f} s",
            is_timed=again_at is not None,
        )

    def open(self) -> None:
        """Make the folder, empty.

        Raises:
            UserError: it holds something that no drill left there.
        """
        marker = self.folder / _MARKER
        if self.folder.exists() and any(self.folder.iterdir()) and not marker.exists():
            raise UserError(f"--folder {self.folder} holds something else than an earlier drill; name another folder.")
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        write_atomically(marker, "{}\n")

    def write(self, outcomes: Sequence[Outcome]) -> None:
        """Write what was found to ``drill.json``."""
        write_atomically(self.folder / _MARKER, json.dumps([o.values() for o in outcomes], indent=2) + "\n")

    def _observe(self, name: str, settings: Sequence[str]) -> ObservedRun:
        return ObservedRun(
            self.config_path,
            [*self._settings(name), *settings],
            RunFolder(self.folder / name),
            self.nproc_per_node,
        )

    def _settings(self, name: str) -> list[str]:
        base = self._plan(()).config
        settings = [
            f"steps={STEPS}",
            f"checkpoint.every_steps={SAVE_EVERY}",
            "metrics.every_steps=1",
            *UNJUDGED,
            "evaluation.max_sequences=4",
            "tracking.wandb.mode=disabled",
            "checkpoint.keep_last=0",
        ]
        settings += [f"{key}=null" for key in ("tokens", "epochs") if getattr(base, key) is not None]
        settings += beginning_of_schedule(base, STEPS)
        return [*settings, *self.overrides, f"output_dir={self.folder}", f"name={name}"]

    def _plan(self, settings: Sequence[str]) -> Any:
        return make_plan(self.config_path, list(settings) or list(self.overrides), self.nproc_per_node, "torchrun")
