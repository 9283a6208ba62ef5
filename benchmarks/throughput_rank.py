"""One rank of ``shardline bench throughput``: a run as it is, timed at the edges of its steps."""

import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.race import row_writer
from sharding.engine import Batch
from sharding.errors import EXIT_FAILED, EXIT_FINISHED
from sharding.process_group import Ranks, process_group
from sharding.process_lifetime import die_with_parent
from trainer.build import build_trainer
from trainer.config import RunConfig, parse_config
from trainer.console import Console
from trainer.data.prepare import prepare_corpus
from trainer.host_memory import keep_freed_memory
from trainer.loop import Trainer
from trainer.observers import Observers
from trainer.phases import Moment, Phase, Phases
from trainer.rank import end_process
from trainer.run_folder import RunFolder


@dataclass(frozen=True)
class ThroughputAssignment:
    """What a rank is told.

    Attributes:
        row: name of the rung.
        config: the run, as plain values.
        has_synthetic_tokens: whether the loader's place is taken by one batch.
        keeps_freed_memory: whether the heap keeps what is freed.
        num_warmup: steps that do not count.
        num_windows: windows that do.
        window_steps: steps of each.
        threads: CPU threads of its operators.
        output: JSONL file that rank 0 appends to.
    """

    row: str
    config: dict[str, Any]
    has_synthetic_tokens: bool
    keeps_freed_memory: bool
    num_warmup: int
    num_windows: int
    window_steps: int
    threads: int
    output: str


class _Measured(BaseException):
    """Ends the loop from inside, on all ranks at the same step: stopping would save a checkpoint."""


class OneBatch:
    """In a loader's place: the same random tokens in every step."""

    def __init__(self, config: RunConfig, dp_degree: int, vocab_size: int) -> None:
        """Draw one rank's micro-batches.

        Args:
            config: for their size.
            dp_degree: ranks that divide a step's sequences.
            vocab_size: of the tokenizer.
        """
        batch, length = config.batch, config.data.sequence_length
        generator = torch.Generator().manual_seed(config.seed)
        self._micro_batches: list[Batch] = []
        for _ in range(batch.global_size // (batch.micro_size * dp_degree)):
            tokens = torch.randint(vocab_size, (batch.micro_size, length + 1), generator=generator)
            made = {"input_ids": tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].contiguous()}
            if torch.cuda.is_available():
                made = {name: tensor.pin_memory() for name, tensor in made.items()}
            self._micro_batches.append(made)

    def next_step(self) -> list[Batch]:
        """See BatchLoader."""
        return self._micro_batches

    def state(self) -> None:
        """See BatchLoader."""

    def close(self) -> None:
        """See BatchLoader."""


class _Measurement:
    """Windows of steps; the device is waited for at their edges alone."""

    def __init__(self, assignment: ThroughputAssignment, config: RunConfig, ranks: Ranks) -> None:
        self._assignment = assignment
        self._config = config
        self._ranks = ranks
        self._write = row_writer(assignment.output, {"row": assignment.row}, ranks)
        self._phases = Phases()
        self._phases.listen(self._see_phase)
        self._num_asked = 0
        self._waited_s = 0.0
        self._opened_at = 0.0
        self._edges: list[Any] = []

    def run(self, folder: Path) -> None:
        """Train until all windows are measured."""
        trainer = self._build(folder)
        facts, length = trainer.parts.facts, self._config.data.sequence_length
        self._write(
            kind="model",
            num_parameters=facts.num_parameters,
            flops_per_token=facts.flops_per_token(length, causal=False),
            flops_per_token_causal=facts.flops_per_token(length, causal=True),
            peak_flops=trainer.parts.peak_flops,
        )
        trainer.resume_or_init()
        with suppress(_Measured):
            trainer.fit()
        peak = torch.tensor([_peak_bytes(self._ranks.device)])
        dist.all_reduce(peak, op=dist.ReduceOp.MAX)
        self._write(kind="memory", peak_bytes=int(peak))

    def _build(self, folder: Path) -> Trainer:
        config, ranks = self._config, self._ranks
        run_folder = RunFolder(folder / "run")
        run_folder.path.mkdir()
        console = Console(config.num_steps, (folder / "console.txt").open("w")) if ranks.rank == 0 else None
        corpus = prepare_corpus(config.data)
        trainer = build_trainer(
            config,
            ranks,
            corpus,
            run_folder,
            Observers(run_folder.metrics_file, console),
            self._phases,
            is_stop_requested=self._at_edge,
            before_commit=lambda: None,
        )
        if not self._assignment.has_synthetic_tokens:
            return trainer
        loader = OneBatch(config, ranks.world_size, corpus.vocab_size)
        parts = replace(trainer.parts, build_loader=lambda _: loader)  # type: ignore[arg-type, return-value]
        return Trainer(config, parts)

    def _at_edge(self) -> bool:
        # The loop asks before each step.
        assignment = self._assignment
        num_measured = self._num_asked - assignment.num_warmup
        self._num_asked += 1
        if num_measured < 0:
            return False
        self._edges.append(self._mark())
        if num_measured % assignment.window_steps == 0:
            if num_measured:
                self._close_window()
            if num_measured == assignment.num_windows * assignment.window_steps:
                raise _Measured
            self._open_window()
        return False

    def _mark(self) -> Any:
        """This moment, on the device's clock where it has one."""
        if self._ranks.device.type == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _open_window(self) -> None:
        self._wait_for_device()
        # On the host, over gloo: a window begins on all ranks at once.
        dist.all_reduce(torch.zeros(1))
        self._waited_s = 0.0
        self._edges = [self._mark()]
        self._opened_at = time.perf_counter()

    def _close_window(self) -> None:
        self._wait_for_device()
        wall_s = time.perf_counter() - self._opened_at
        pairs = zip(self._edges, self._edges[1:], strict=False)
        if self._ranks.device.type == "cpu":
            steps_s = [after - before for before, after in pairs]
        else:
            steps_s = [before.elapsed_time(after) / 1e3 for before, after in pairs]
        local = torch.tensor([wall_s, self._waited_s, *steps_s], dtype=torch.float64)
        rows = [torch.empty_like(local) for _ in range(self._ranks.world_size)]
        dist.all_gather(rows, local)
        by_rank = torch.stack(rows)
        self._write(
            kind="window",
            wall_s=by_rank[:, 0].max().item(),
            data_wait_s=by_rank[:, 1].mean().item(),
            steps_s=by_rank[:, 2:].max(dim=0).values.tolist(),
        )

    def _wait_for_device(self) -> None:
        if self._ranks.device.type == "cuda":
            torch.cuda.synchronize()

    def _see_phase(self, ended: Moment, begun: Moment) -> None:
        if ended.phase is Phase.DATA:
            self._waited_s += begun.since - ended.since


def _peak_bytes(device: torch.device) -> int:
    """Highest memory use of this process so far: allocated on a GPU, resident on a CPU; 0 where nobody tells."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Not getrusage: its figure begins with that of the process that started this one.
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def main(arguments: Sequence[str]) -> None:
    """Measure one rung; the only argument is a JSON file with a ThroughputAssignment."""
    die_with_parent()
    assignment = ThroughputAssignment(**json.loads(Path(arguments[0]).read_text()))
    config = parse_config(assignment.config, source=assignment.row)
    torch.set_num_threads(assignment.threads)
    if assignment.keeps_freed_memory:
        keep_freed_memory(os.environ)
    try:
        with process_group(config.launch.init_timeout_s) as ranks, tempfile.TemporaryDirectory() as folder:
            _Measurement(assignment, config, ranks).run(Path(folder))
    except BaseException:  # noqa: BLE001 - whatever it was, the other ranks must not wait for this one
        traceback.print_exc()
        end_process(EXIT_FAILED)
    end_process(EXIT_FINISHED)


if __name__ == "__main__":
    main(sys.argv[1:])
