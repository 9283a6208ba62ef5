"""A race: contestants of one process group, taking turns step by step."""

import gc
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.contestants.contest import BuildContestant, Contest, Contestant
from benchmarks.contestants.plain_loop import PlainLoop
from benchmarks.measure.protocol import order_of_round
from benchmarks.measure.step_profile import StepProfile
from benchmarks.measure.turns import StepEdge, StepTime, Turns
from benchmarks.presentation.result_files import WriteRow, append_row
from sharding.mesh import build_mesh
from sharding.precision import compute_dtype
from sharding.ranks.process_group import Ranks
from trainer.config import RunConfig
from trainer.data.packed import sample_facts
from trainer.data.prepare import prepare_corpus
from trainer.model.engine import build_model_engine
from trainer.tasks.registry import configured_task

LOSS_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2}
"""Largest relative difference of a contestant's loss from the plain loop's, up to the end of the warm-up."""

_COLLECT_EVERY_ROUNDS = 50
_NUM_PROGRESS_LINES = 20
# Readers look a little ahead.
_NUM_SPARE_STEPS = 2


@dataclass(frozen=True)
class Rounds:
    """How long a race is.

    Attributes:
        num_warmup: rounds that are discarded.
        num_pairs: rounds that count.
        steps_per_turn: steps that a contestant takes one after the other when it is its turn.
        num_profiled: steps of each contestant that are profiled after that; 0 for none.
    """

    num_warmup: int
    num_pairs: int
    steps_per_turn: int = 1
    num_profiled: int = 0

    @property
    def num_rounds(self) -> int:
        """All rounds."""
        return self.num_warmup + self.num_pairs

    @property
    def num_steps(self) -> int:
        """All steps that a contestant needs data for."""
        # The first step of a profiled turn is not looked at.
        profiled = self.num_profiled + 1 if self.num_profiled else 0
        return self.num_rounds * self.steps_per_turn + profiled + _NUM_SPARE_STEPS


def row_writer(output: str, labels: Mapping[str, Any], ranks: Ranks) -> WriteRow:
    """Rows of a JSONL file, each with these labels; only the first rank writes."""

    def write(*, kind: str, **row: Any) -> None:
        if ranks.rank == 0:
            append_row(Path(output), {**labels, "kind": kind, **row})

    return write


def build_contest(config: RunConfig, ranks: Ranks, num_steps: int, folder: Path) -> Contest:
    """Corpus, initial parameters and sizes for all contestants.

    Args:
        config: the run that all train.
        ranks: this rank's place.
        num_steps: steps that any contestant takes at most.
        folder: scratch space of this rank.
    """
    (corpus,) = prepare_corpus(config.data).corpora
    alone = config.model_copy(update={"parallel": config.parallel.model_copy(update={"strategy": "none"})})
    facts = sample_facts(corpus, config.data)
    task = configured_task(config.task, facts, z_loss=0.0, loss_chunk_tokens=0)
    engine, _ = build_model_engine(alone, task, build_mesh(alone.parallel, ranks), ranks, facts)
    initial = {name: tensor.clone() for name, tensor in engine.named_local_shards().items()}
    dtype = compute_dtype(config.precision, ranks.device)
    return Contest(config, ranks, corpus, initial, num_steps, dtype, folder)


class Race:
    """Gives turns, and keeps times."""

    def __init__(
        self,
        contest: Contest,
        builders: Mapping[str, BuildContestant],
        rounds: Rounds,
        *,
        threads: int,
        title: str,
        write: WriteRow,
    ) -> None:
        """Build the contestants, in the given order.

        Args:
            contest: what all share.
            builders: contestants by name; ``plain`` is the one that others are compared with.
            rounds: how long it is.
            threads: CPU threads of each contestant's operators.
            title: what progress is reported of.
            write: takes the rows of the result.
        """
        self._contest = contest
        self._ranks = contest.ranks
        self._rounds = rounds
        self._threads = threads
        self._title = title
        self._write = write
        self._contestants: dict[str, Contestant] = {name: build(contest) for name, build in builders.items()}
        self._names = list(self._contestants)
        self._started_at = time.monotonic()

    def run(self) -> None:
        """All rounds, and the profiled turns."""
        rounds = self._rounds
        turns = {name: self._start(name, contestant) for name, contestant in self._contestants.items()}
        self._write(kind="settings", contestants={name: c.settings for name, c in self._contestants.items()})
        # A collection would fall into the step of whoever's turn it is. Shardline turns them off by itself.
        gc.disable()
        for index in range(rounds.num_rounds):
            self._take_round(index, turns)
            if index + 1 == rounds.num_warmup:
                self._check_losses(tolerance=LOSS_TOLERANCE[self._contest.compute_dtype])
                gc.freeze()
            if index % _COLLECT_EVERY_ROUNDS == 0:
                gc.collect()
        self._check_losses(tolerance=None)
        if rounds.num_profiled:
            self._profile(turns)
        for contestant_turns in turns.values():
            contestant_turns.end()
        # What follows may be another race.
        gc.unfreeze()
        gc.enable()

    def _start(self, name: str, contestant: Contestant) -> Turns:
        device, threads = self._ranks.device, self._threads

        def run(step_edge: StepEdge) -> None:
            # Both belong to a thread.
            torch.set_num_threads(threads)
            if device.type == "cuda":
                torch.cuda.set_device(device)

            def checked_edge() -> None:
                if torch.get_num_threads() != threads:
                    raise RuntimeError(f"{name} changed its threads from {threads} to {torch.get_num_threads()}")
                step_edge()

            contestant.run(checked_edge)

        def finish() -> None:
            # What a contestant leaves under way would go on in somebody else's time.
            contestant.settle()
            if device.type == "cuda":
                torch.cuda.synchronize()

        return Turns(run, finish)

    def _take_round(self, index: int, turns: dict[str, Turns]) -> None:
        times = dict.fromkeys(self._names, StepTime(0.0, 0.0))
        order = order_of_round(self._names, index, self._contest.config.seed)
        for name in order:
            self._wait_for_all_ranks()
            times[name] = turns[name].take(self._rounds.steps_per_turn)
        wall_s = self._gather([times[name].wall_s for name in self._names])
        cpu_s = self._gather([times[name].cpu_s for name in self._names])
        kind = "warmup" if index < self._rounds.num_warmup else "round"
        self._write(kind=kind, order=order, wall_s=wall_s, cpu_s=cpu_s)
        self._show_progress(index + 1)

    def _profile(self, turns: dict[str, Turns]) -> None:
        for name in self._names:
            profile = StepProfile(self._ranks.device)
            self._wait_for_all_ranks()
            # What the step before the first left under way is not there: the first is not looked at.
            turns[name].take(self._rounds.num_profiled + 1, profile)
            found = profile.shares()
            by_rank = [torch.empty(len(found), dtype=torch.float64) for _ in range(self._ranks.world_size)]
            dist.all_gather(by_rank, torch.tensor(list(found.values()), dtype=torch.float64))
            values = torch.stack(by_rank, dim=1).tolist()
            self._write(kind="profile", contestant=name, **dict(zip(found, values, strict=True)))

    def _gather(self, values: list[float]) -> dict[str, list[float]]:
        """By contestant, the values of all ranks."""
        local = torch.tensor(values, dtype=torch.float64)
        rows = [torch.empty_like(local) for _ in range(self._ranks.world_size)]
        dist.all_gather(rows, local)
        return dict(zip(self._names, torch.stack(rows, dim=1).tolist(), strict=True))

    def _wait_for_all_ranks(self) -> None:
        # On the host, over gloo: a step begins on all ranks at once.
        dist.all_reduce(torch.zeros(1))

    def _check_losses(self, *, tolerance: float | None) -> None:
        """Compare what everyone logged with the plain loop's losses of the same steps, and record both.

        Raises:
            RuntimeError: they differ by more than the tolerance, or someone has logged nothing: the contestants do not
                do the same work.
        """
        plain = self._contestants["plain"]
        assert isinstance(plain, PlainLoop)
        reference = plain.step_losses()
        if self._ranks.rank:
            return
        for name, contestant in self._contestants.items():
            log = contestant.step_log()
            expected = {step: reference[step - log.averaged_over : step].mean().item() for step in log.losses}
            differences = [abs(log.losses[step] - loss) / abs(loss) for step, loss in expected.items()]
            largest = max(differences, default=float("nan"))
            self._write(
                kind="losses",
                contestant=name,
                averaged_over=log.averaged_over,
                losses=log.losses,
                largest_difference=largest,
                at_end_of_warmup=tolerance is not None,
            )
            if tolerance is not None and not largest <= tolerance:
                raise RuntimeError(
                    f"{name} does other work than the plain loop: its logged losses are {log.losses}, the plain "
                    f"loop's {expected}; they may differ by {tolerance:.0e}, relative"
                )

    def _show_progress(self, num_done: int) -> None:
        rounds = self._rounds
        num_measured = num_done - rounds.num_warmup
        every = max(1, rounds.num_rounds // _NUM_PROGRESS_LINES)
        if self._ranks.rank or num_done % every:
            return
        what = "warming up" if num_measured <= 0 else f"{num_measured} of {rounds.num_pairs} pairs"
        elapsed_s = time.monotonic() - self._started_at
        left_s = elapsed_s / num_done * (rounds.num_rounds - num_done)
        print(f"{self._title}: {what}, {elapsed_s:.0f} s, about {left_s:.0f} s left", flush=True)
