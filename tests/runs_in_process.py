"""Whole runs, one after another in one process group: what they leave behind, without a process start for each."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sharding.ranks.process_group import Ranks
from tests.saved_state import stored_state
from tests.support import read_metrics, tiny_values
from trainer.attempt import begin_attempt
from trainer.build import build_trainer
from trainer.checkpoint.reader import CheckpointReader
from trainer.checkpoint.training_state import TrainingState
from trainer.config import RunConfig, parse_config
from trainer.config.rules import World
from trainer.data.prepare_stages import prepare_run
from trainer.faults.injection.inject import Fault, inject_faults
from trainer.loop import ExitReason
from trainer.metrics.stragglers import StragglerWatch
from trainer.run_folder.folder import RunFolder
from trainer.runtime.phases import Phases
from trainer.trackers.console import Console
from trainer.trackers.observers import Observers

# What training computes; times, rates and bytes are left out.
_COMPUTED = ("step", "train/", "eval/")


@dataclass
class RunsInProcess:
    """Starts runs one after another in this process group.

    Attributes:
        ranks: this rank's place.
        root: where run folders, cache and consoles go.
        corpus: folder of text files.
        phases: of the last run.
    """

    ranks: Ranks
    root: Path
    corpus: Path
    phases: Phases = field(default_factory=Phases)

    def train(
        self, name: str, injected: Sequence[Fault] = (), steps: int = 10, stop_at: int | None = None, **sections: Any
    ) -> RunFolder:
        """Train, or continue, to a number of steps; saved every three steps unless told otherwise.

        Args:
            name: of the run.
            injected: faults, for all ranks.
            steps: number of steps.
            stop_at: step before which a stop is asked for.
            sections: settings by section.

        Raises:
            RuntimeError: a fault ``raise`` was triggered.
        """
        values = tiny_values(self.root / "runs", self.root / "cache", self.corpus)
        values |= {"name": name, "steps": steps, "checkpoint": {"every_steps": 3, "keep_last": 0}}
        for key, section in sections.items():
            values[key] = values.get(key, {}) | section
        return self.train_as(parse_config(values, name), injected, stop_at)

    def train_as(self, config: RunConfig, injected: Sequence[Fault] = (), stop_at: int | None = None) -> RunFolder:
        """Train, or continue, what a configuration says; see ``train``."""
        folder = RunFolder(config.run_dir)
        observers = Observers(folder.metrics_file)
        if self.ranks.rank == 0:
            begin_attempt(folder, config, World(self.ranks.world_size, has_gpu=False), [])
            console = Console(config.num_steps, (self.root / f"{config.name}.log").open("a"))
            # A rank that only a busy machine makes slow is of no interest.
            is_slowed = any(fault.fault == "slow" for fault in injected)
            watch = StragglerWatch(config.faults.straggler_ratio) if is_slowed else None
            observers = Observers(folder.metrics_file, console, attempt=folder.newest_attempt(), stragglers=watch)
        dist.barrier()
        self.phases = phases = Phases()
        asked = threading.Event()

        def is_stop_requested() -> bool:
            if stop_at is not None and phases.now.step >= stop_at:
                asked.set()
            return asked.is_set()

        inject_faults(list(injected), phases, folder.path, self.ranks.rank, attempt=1)
        # A file lock lets one rank work.
        corpora = prepare_run(config)
        trainer = build_trainer(
            config,
            self.ranks,
            corpora,
            folder,
            observers,
            phases,
            faults=[fault for fault in injected if fault.rank == self.ranks.rank],
            is_stop_requested=is_stop_requested,
            before_commit=lambda: None,
        )
        trainer.resume_or_init()
        try:
            exit_reason = trainer.fit()
        finally:
            trainer.close()
            # A process that fails takes it along; here it would write beside the next attempt.
            for thread in threading.enumerate():
                if thread.name == "checkpoint-writer":
                    thread.join()
        assert (exit_reason is ExitReason.STOPPED) == (stop_at is not None)
        dist.barrier()
        return folder

    def console(self, name: str) -> str:
        """What a person saw of a run."""
        return (self.root / f"{name}.log").read_text()


def saved_state(folder: RunFolder, step: int) -> tuple[TrainingState, dict[str, torch.Tensor]]:
    """Counters and every tensor, optimizer included, of a checkpoint."""
    path = folder.checkpoint_path(step)
    return CheckpointReader(path).manifest.training, stored_state(path)


def computed_lines(folder: RunFolder) -> list[dict[str, Any]]:
    """metrics.jsonl without what is measured in seconds or bytes."""
    lines = read_metrics(folder.path)
    return [{name: value for name, value in line.items() if name.startswith(_COMPUTED)} for line in lines]
