"""A race: contestants of one process group, taking turns step by step."""

import gc
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional

from benchmarks.contestants.agreement import agreement
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

REFERENCE = "plain"
"""The contestant that all others are compared with, a ``PlainLoop``."""

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
        start: int = 0,
    ) -> None:
        """Build the contestants, in an order that is drawn by the run's seed and the start.

        Args:
            contest: what all share.
            builders: contestants by name; ``REFERENCE`` is the one that others are compared with.
            rounds: how long it is.
            threads: CPU threads of each contestant's operators.
            title: what progress is reported of.
            write: takes the rows of the result.
            start: the how manieth start of this race, from 0: each has its own order of building and of turns.
        """
        self._contest = contest
        self._ranks = contest.ranks
        self._rounds = rounds
        self._threads = threads
        self._title = title
        self._write = write
        self._seed = f"{contest.config.seed}:{start}"
        linear = functional.linear
        order = build_order(list(builders), self._seed)
        self._contestants: dict[str, Contestant] = {name: builders[name](contest) for name in order}
        if functional.linear is not linear:
            raise RuntimeError("a contestant has changed torch.nn.functional.linear for all of them")
        # In the order of the field, whoever was built first.
        self._names = list(builders)
        self._started_at = time.monotonic()

    def run(self) -> None:
        """All rounds, and the profiled turns."""
        rounds = self._rounds
        turns = {name: self._start(name, contestant) for name, contestant in self._contestants.items()}
        settings = {name: self._contestants[name].settings for name in self._names}
        self._write(kind="settings", contestants=settings, built=list(self._contestants))
        # A collection would fall into the step of whoever's turn it is. Shardline turns them off by itself.
        gc.disable()
        for index in range(rounds.num_rounds):
            self._take_round(index, turns)
            if index + 1 == rounds.num_warmup:
                self._check_work(at_end_of_warmup=True)
                gc.freeze()
            if index % _COLLECT_EVERY_ROUNDS == 0:
                gc.collect()
        self._check_work(at_end_of_warmup=False)
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
        order = order_of_round(self._names, index, self._seed)
        for name in order:
            self._wait_for_all_ranks()
            times[name] = turns[name].take(self._rounds.steps_per_turn)
        wall_s = self._gather([times[name].wall_s for name in self._names])
        cpu_s = self._gather([times[name].cpu_s for name in self._names])
        kind = "warmup" if index < self._rounds.num_warmup else "round"
        self._write(kind=kind, order=order, wall_s=wall_s, cpu_s=cpu_s)
        self._show_progress(index + 1)

    def _profile(self, turns: dict[str, Turns]) -> None:
        for name in (name for name in self._names if self._contestants[name].trains):
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

    def _check_work(self, *, at_end_of_warmup: bool) -> None:
        """Compare what everyone logged with the plain loop's figures of the same steps, and record both.

        Raises:
            RuntimeError: they differ by more than rounding, or someone has logged nothing: the contestants do not do
                the same work.
        """
        plain = self._contestants[REFERENCE]
        assert isinstance(plain, PlainLoop)
        losses, norms = (values.tolist() for values in plain.step_facts())
        if self._ranks.rank:
            return
        complaints = []
        for name, contestant in self._contestants.items():
            if not contestant.trains:
                continue
            log = contestant.step_log()
            found = agreement(name, log, losses, norms, self._contest.compute_dtype)
            self._write(
                kind="losses",
                contestant=name,
                averaged_over=log.averaged_over,
                losses=log.losses,
                grad_norms=log.grad_norms,
                largest_difference=max(found.loss_differences.values(), default=float("nan")),
                largest_norm_difference=max(found.norm_differences.values(), default=float("nan")),
                at_end_of_warmup=at_end_of_warmup,
            )
            complaints += [found.complaint] if found.complaint else []
        if complaints:
            raise RuntimeError("; ".join(complaints))

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


def build_order(names: Sequence[str], seed: str) -> list[str]:
    """Contestants in a random order, the same on all ranks.

    Who is built first has its memory in another place than who is built last, so that the order is a part of luck.

    Args:
        names: the contestants'.
        seed: of the order.
    """
    order = list(names)
    random.Random(seed).shuffle(order)
    if {"transformers", "accelerate"} <= set(order):
        # The arguments of transformers' Trainer reset state that Accelerate shares within a process.
        first, second = sorted((order.index("transformers"), order.index("accelerate")))
        order[first], order[second] = "transformers", "accelerate"
    return order
