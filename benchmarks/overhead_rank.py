"""One rank of ``shardline bench overhead``: every contestant in one process group, taking turns step by step."""

import gc
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.assignment import Assignment
from benchmarks.contestants.contest import Contest, Contestant
from benchmarks.contestants.field import BUILDERS, CONTROL
from benchmarks.contestants.plain_loop import PlainLoop
from benchmarks.protocol import order_of_round
from benchmarks.turns import StepEdge, StepTime, Turns
from sharding.errors import EXIT_FAILED, EXIT_FINISHED
from sharding.mesh import build_mesh
from sharding.precision import compute_dtype
from sharding.process_group import Ranks, process_group
from sharding.process_lifetime import die_with_parent
from trainer.config import RunConfig, parse_config
from trainer.data.prepare import prepare_corpus
from trainer.model_engine import build_model_engine
from trainer.models import Vocabulary
from trainer.rank import end_process
from trainer.tasks.registry import build_task

LOSS_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2}
"""Largest relative difference of a contestant's loss from the plain loop's, up to the end of the warm-up."""

_COLLECT_EVERY_ROUNDS = 50
_NUM_PROGRESS_LINES = 20


def main(arguments: Sequence[str]) -> None:
    """Measure one size; the only argument is a JSON file with an Assignment."""
    die_with_parent()
    assignment = Assignment(**json.loads(Path(arguments[0]).read_text()))
    config = parse_config(assignment.config, source=assignment.size)
    torch.set_num_threads(assignment.threads)
    try:
        with process_group(config.launch.init_timeout_s) as ranks, tempfile.TemporaryDirectory() as folder:
            Race(assignment, build_contest(assignment, config, ranks, Path(folder))).run()
    except BaseException:  # noqa: BLE001 - whatever it was, contestants in the middle of a step must not hold us up
        traceback.print_exc()
        end_process(EXIT_FAILED)
    end_process(EXIT_FINISHED)


def build_contest(assignment: Assignment, config: RunConfig, ranks: Ranks, folder: Path) -> Contest:
    """Corpus, initial parameters and sizes for all contestants."""
    (corpus,) = prepare_corpus(config.data).corpora
    alone = config.model_copy(update={"parallel": config.parallel.model_copy(update={"strategy": "none"})})
    vocabulary = Vocabulary(corpus.vocab_size, corpus.eos_token_id)
    task = build_task(config.task.name)
    engine, _ = build_model_engine(alone, task, build_mesh(alone.parallel, ranks), ranks, vocabulary)
    initial = {name: tensor.clone() for name, tensor in engine.named_local_shards().items()}
    dtype = compute_dtype(config.precision, ranks.device)
    # Readers look a little ahead.
    return Contest(config, ranks, corpus, initial, assignment.num_rounds + 2, dtype, folder)


class Race:
    """Gives turns, and keeps times."""

    def __init__(self, assignment: Assignment, contest: Contest) -> None:
        self._assignment = assignment
        self._contest = contest
        self._ranks = contest.ranks
        builders = BUILDERS | ({CONTROL: PlainLoop} if assignment.with_control else {})
        self._contestants: dict[str, Contestant] = {name: build(contest) for name, build in builders.items()}
        self._names = list(self._contestants)
        self._started_at = time.monotonic()

    def run(self) -> None:
        """All rounds."""
        assignment = self._assignment
        turns = {name: self._start(name, contestant) for name, contestant in self._contestants.items()}
        self._write(kind="settings", contestants={name: c.settings for name, c in self._contestants.items()})
        # A collection would fall into the step of whoever's turn it is. Shardline turns them off by itself.
        gc.disable()
        for index in range(assignment.num_rounds):
            self._take_round(index, turns)
            if index + 1 == assignment.num_warmup:
                self._check_losses(tolerance=LOSS_TOLERANCE[self._contest.compute_dtype])
                gc.freeze()
            if index % _COLLECT_EVERY_ROUNDS == 0:
                gc.collect()
        self._check_losses(tolerance=None)
        for contestant_turns in turns.values():
            contestant_turns.end()

    def _start(self, name: str, contestant: Contestant) -> Turns:
        device, threads = self._ranks.device, self._assignment.threads

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

        return Turns(run, torch.cuda.synchronize if device.type == "cuda" else lambda: None)

    def _take_round(self, index: int, turns: dict[str, Turns]) -> None:
        times = dict.fromkeys(self._names, StepTime(0.0, 0.0))
        order = order_of_round(self._names, index, self._contest.config.seed)
        for name in order:
            self._wait_for_all_ranks()
            times[name] = turns[name].take()
        wall_s = self._gather([times[name].wall_s for name in self._names])
        cpu_s = self._gather([times[name].cpu_s for name in self._names])
        kind = "warmup" if index < self._assignment.num_warmup else "round"
        self._write(kind=kind, order=order, wall_s=wall_s, cpu_s=cpu_s)
        self._show_progress(index + 1)

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
        assignment = self._assignment
        num_measured = num_done - assignment.num_warmup
        every = max(1, assignment.num_rounds // _NUM_PROGRESS_LINES)
        if self._ranks.rank or num_done % every:
            return
        what = "warming up" if num_measured <= 0 else f"{num_measured} of {assignment.num_pairs} pairs"
        elapsed_s = time.monotonic() - self._started_at
        left_s = elapsed_s / num_done * (assignment.num_rounds - num_done)
        print(f"{assignment.size}: {what}, {elapsed_s:.0f} s, about {left_s:.0f} s left", flush=True)

    def _write(self, **row: Any) -> None:
        if self._ranks.rank == 0:
            with Path(self._assignment.output).open("a") as file:
                file.write(json.dumps({"size": self._assignment.size} | row) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
