"""A run of Shardline as it is, timed at the edges of its steps."""

import json
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.measure.step_profile import StepProfile
from benchmarks.presentation.result_files import WriteRow
from sharding.ranks.process_group import Ranks
from trainer.build import build_trainer
from trainer.config import RunConfig
from trainer.data.packed import packed_rows
from trainer.data.prepare import prepare_corpus
from trainer.data.prepared_stages import whole_run
from trainer.data.samples import MicroBatch
from trainer.loop import Trainer
from trainer.run_folder.folder import RunFolder
from trainer.runtime.phases import Phase, Phases, PhaseState
from trainer.trackers.console import Console
from trainer.trackers.observers import Observers


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
        self._micro_batches: list[MicroBatch] = []
        for _ in range(batch.global_size // (batch.micro_size * dp_degree)):
            tokens = torch.randint(vocab_size, (batch.micro_size, length + 1), generator=generator)
            self._micro_batches.append(MicroBatch(packed_rows(tokens.numpy()), torch.arange(batch.micro_size)))

    def next_step(self) -> list[MicroBatch]:
        """See BatchLoader."""
        return self._micro_batches

    def state(self) -> None:
        """See BatchLoader."""

    def close(self) -> None:
        """See BatchLoader."""


@dataclass(frozen=True)
class Windows:
    """How long a run is measured.

    Attributes:
        num_warmup: steps that do not count.
        num_windows: windows that do.
        window_steps: steps of each.
    """

    num_warmup: int
    num_windows: int
    window_steps: int

    @property
    def num_steps(self) -> int:
        """Steps that the run must have; one more, for the loop is left where it asks before a step."""
        return self.num_warmup + self.num_windows * self.window_steps + 1


class MeasuredRun:
    """A run as it is, in windows of steps; the device is waited for at their edges alone."""

    def __init__(
        self,
        config: RunConfig,
        ranks: Ranks,
        windows: Windows,
        write: WriteRow,
        *,
        has_synthetic_tokens: bool = False,
        profile: StepProfile | None = None,
    ) -> None:
        """Plan to measure.

        Args:
            config: of a run with ``windows.num_steps`` steps.
            ranks: this rank's place.
            windows: how long.
            write: takes the rows: ``model``, ``window``, ``memory`` and ``loss``.
            has_synthetic_tokens: whether the loader's place is taken by one batch that is there already.
            profile: looks at the window, of which there is one then.
        """
        self._config = config
        self._ranks = ranks
        self._windows = windows
        self._write = write
        self._has_synthetic_tokens = has_synthetic_tokens
        self._profile = profile
        self._phases = Phases()
        self._phases.listen(self._see_phase)
        self._num_asked = 0
        self._waited_s = 0.0
        self._opened_at = 0.0
        self._edges: list[Any] = []

    def run(self, folder: Path) -> None:
        """Train until all windows are measured.

        Args:
            folder: an empty one, for the run's.
        """
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
        try:
            with suppress(_Measured):
                trainer.fit()
        finally:
            trainer.close()
        peak = torch.tensor([_peak_bytes(self._ranks.device)])
        dist.all_reduce(peak, op=dist.ReduceOp.MAX)
        self._write(kind="memory", peak_bytes=int(peak))
        logged = folder / "run" / "metrics.jsonl"
        if self._ranks.rank == 0 and logged.exists():
            lines = [json.loads(line) for line in logged.read_text().splitlines()]
            self._write(
                kind="loss", steps=[line["step"] for line in lines], losses=[line["train/loss"] for line in lines]
            )

    def _build(self, folder: Path) -> Trainer:
        config, ranks = self._config, self._ranks
        run_folder = RunFolder(folder / "run")
        run_folder.path.mkdir()
        console = Console(config.num_steps, (folder / "console.txt").open("w")) if ranks.rank == 0 else None
        corpus = prepare_corpus(config.data)
        trainer = build_trainer(
            config,
            ranks,
            whole_run(config, corpus),
            run_folder,
            Observers(run_folder.metrics_file, console),
            self._phases,
            is_stop_requested=self._at_edge,
            before_commit=lambda: None,
        )
        if not self._has_synthetic_tokens:
            return trainer
        loader = OneBatch(config, trainer.parts.mesh.data.degree, corpus.vocab_size)
        stage = replace(trainer.parts.stages[0], build_loader=lambda _: loader)  # type: ignore[arg-type, return-value]
        parts = replace(trainer.parts, stages=[stage])
        return Trainer(config, parts)

    def _at_edge(self) -> bool:
        # The loop asks before each step.
        windows = self._windows
        num_measured = self._num_asked - windows.num_warmup
        self._num_asked += 1
        if num_measured < 0:
            return False
        self._edges.append(self._mark())
        if num_measured % windows.window_steps == 0:
            if num_measured:
                self._close_window()
            if num_measured == windows.num_windows * windows.window_steps:
                raise _Measured
            self._open_window()
        elif self._profile is not None:
            self._profile.edge()
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
        if self._profile is not None:
            self._profile.begin()
            self._profile.edge()
        self._opened_at = time.perf_counter()

    def _close_window(self) -> None:
        self._wait_for_device()
        wall_s = time.perf_counter() - self._opened_at
        if self._profile is not None:
            self._profile.edge()
            self._profile.end()
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

    def _see_phase(self, ended: PhaseState, begun: PhaseState) -> None:
        if ended.phase is Phase.DATA:
            self._waited_s += begun.since - ended.since


def _peak_bytes(device: torch.device) -> int:
    """Highest memory use of this process so far: allocated on a GPU, resident on a CPU; 0 where nobody tells."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_resident_bytes()


def peak_resident_bytes() -> int:
    """Highest resident memory of this process so far, files that it has mapped included; 0 where nobody tells."""
    # Not getrusage: its figure begins with that of the process that started this one.
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
