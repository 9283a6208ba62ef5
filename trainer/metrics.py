"""Metrics of a run: gathered without waiting for the device, written at log intervals."""

import errno
import json
import math
import os
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sharding.errors import UserError
from sharding.process_group import Ranks
from trainer.models import ModelFacts
from trainer.noise_scale import NoiseMeasurement, NoiseScale
from trainer.stragglers import slowest_rank
from trainer.system_metrics import NUM_SYSTEM_VALUES, SystemMeter, system_metrics

Metrics = dict[str, float | int | None]


@dataclass
class StepRecord:
    """What one step leaves behind: device scalars that nobody has waited for yet.

    Attributes:
        loss_sum: this rank's summed loss.
        num_targets: valid targets of the global batch.
        grad_norm: global norm before clipping.
        learning_rate: rate of the step.
        loss_scale: present loss scale under fp16; None elsewhere.
        noise: measurement of the gradient noise, where the step has one.
    """

    loss_sum: torch.Tensor
    num_targets: int
    grad_norm: torch.Tensor
    learning_rate: float
    loss_scale: torch.Tensor | None = None
    noise: NoiseMeasurement | None = None


@dataclass
class ThroughputClock:
    """Time and tokens since the last log line; evaluation and saving do not count.

    Tokens are the positions that the model computes on, with or without a target: these cost the time.

    ``take_busy_s`` gives the time that this rank worked by itself.
    """

    num_tokens: int = 0
    num_steps: int = 0
    data_wait_s: float = 0.0
    take_busy_s: Callable[[], float] = lambda: 0.0
    _paused_s: dict[str, float] = field(default_factory=dict)
    _started_at: float = field(default_factory=time.perf_counter)

    def add_step(self, num_tokens: int, data_wait_s: float) -> None:
        """Count one step's tokens and the time it waited for data, in seconds."""
        self.num_tokens += num_tokens
        self.num_steps += 1
        self.data_wait_s += data_wait_s

    @contextmanager
    def paused(self, work: str) -> Iterator[None]:
        """Leave the time spent inside out of the account; ``work`` names what it is spent on."""
        started_at = time.perf_counter()
        try:
            yield
        finally:
            self._paused_s[work] = self._paused_s.get(work, 0.0) + time.perf_counter() - started_at

    def elapsed_s(self) -> float:
        """Seconds of training since the last restart."""
        return max(time.perf_counter() - self._started_at - sum(self._paused_s.values()), 1e-9)

    def paused_s(self, work: str) -> float:
        """Seconds spent on ``work`` since the last restart."""
        return self._paused_s.get(work, 0.0)

    def time_shares(self, data_wait_fraction: float) -> Metrics:
        """What wall time since the last restart was spent on, in shares that add up to 1.

        Args:
            data_wait_fraction: share of training time in which the ranks waited for data.
        """
        training_s = self.elapsed_s()
        total_s = training_s + sum(self._paused_s.values())
        return {
            "time/training_fraction": training_s * (1.0 - data_wait_fraction) / total_s,
            "time/data_wait_fraction": training_s * data_wait_fraction / total_s,
            "time/evaluation_fraction": self.paused_s("evaluation") / total_s,
            "time/saving_fraction": self.paused_s("saving") / total_s,
        }

    def restart(self) -> None:
        """Begin a new interval."""
        self.num_tokens = self.num_steps = 0
        self.data_wait_s = 0.0
        self._paused_s = {}
        self._started_at = time.perf_counter()


class SkippedSteps:
    """Counts skipped steps on the device, so that counting needs no host sync."""

    def __init__(self, device: torch.device, total: int = 0, in_a_row: int = 0) -> None:
        """Start from the counts of a checkpoint."""
        self.total = torch.tensor(float(total), device=device)
        self.in_a_row = torch.tensor(float(in_a_row), device=device)
        self.longest = self.in_a_row.clone()
        self._looked_at = torch.zeros((), pin_memory=device.type == "cuda")
        self._is_copied = torch.cuda.Event() if device.type == "cuda" else None

    def add(self, stepped: torch.Tensor) -> None:
        """Count one step; ``stepped`` is 1 where parameters were updated, else 0."""
        skipped = 1.0 - stepped
        self.total += skipped
        self.in_a_row = (self.in_a_row + skipped) * skipped
        self.longest = torch.maximum(self.longest, self.in_a_row)

    def look(self) -> int:
        """The longest series of skipped steps as it was at the look before this one; 0 at the first.

        What is seen now is copied meanwhile: the device has long done so by the next look, and no step waits for it.
        """
        if self._is_copied is not None:
            self._is_copied.synchronize()
        longest = int(self._looked_at)
        self._looked_at.copy_(self.longest, non_blocking=True)
        if self._is_copied is not None:
            self._is_copied.record()
        return longest


def summarize_step(
    record: StepRecord,
    skipped: SkippedSteps,
    clock: ThroughputClock,
    meter: SystemMeter,
    ranks: Ranks,
    noise_scale: NoiseScale | None = None,
) -> tuple[Metrics, int]:
    """Turn device scalars into numbers: one host sync and one reduction over ranks; every rank must call it.

    Args:
        record: the step.
        skipped: counts of skipped steps.
        clock: time and tokens of the interval.
        meter: use of nodes and GPUs.
        ranks: this rank's place.
        noise_scale: takes in the step's measurement, where noise is measured.

    Returns:
        The interval's metrics, and the longest series of skipped steps so far.
    """
    # One transfer for all scalars: the only place in the loop that waits for the device.
    noise = record.noise or NoiseMeasurement(torch.zeros_like(record.loss_sum), 0)
    device_scalars = [record.loss_sum, record.grad_norm, skipped.total, skipped.longest, noise.square]
    if record.loss_scale is not None:
        device_scalars.append(record.loss_scale)
    loss_sum, grad_norm, num_skipped, longest_skip, micro_square, *loss_scale = torch.stack(
        [scalar.double() for scalar in device_scalars]
    ).tolist()
    elapsed_s = clock.elapsed_s()
    waited = clock.data_wait_s / elapsed_s
    own = [loss_sum, waited, peak_memory_gib(ranks.device), micro_square, noise.num_micro_batches]
    own += [clock.take_busy_s(), *meter.measure()]
    rows = gather_rows(torch.tensor(own, dtype=torch.float64), ranks)
    slowest, slowest_ratio = slowest_rank(rows[:, 5].tolist(), elapsed_s)
    tokens_per_s = clock.num_tokens / elapsed_s
    metrics: Metrics = {
        "train/loss": float(rows[:, 0].sum()) / max(record.num_targets, 1),
        "train/grad_norm": grad_norm,
        "train/learning_rate": record.learning_rate,
        "train/skipped_steps": int(num_skipped),
        "throughput/tokens_per_s": tokens_per_s,
        "throughput/tokens_per_s_per_device": tokens_per_s / ranks.world_size,
        "throughput/data_wait_fraction": float(rows[:, 1].mean()),
        "throughput/step_time_s": elapsed_s / max(clock.num_steps, 1),
        "throughput/slowest_rank": slowest,
        "throughput/slowest_rank_ratio": slowest_ratio,
        "memory/peak_gib": float(rows[:, 2].max()),
    }
    if loss_scale:
        metrics["train/loss_scale"] = loss_scale[0]
    metrics |= system_metrics(rows[:, -NUM_SYSTEM_VALUES:])
    if noise_scale is not None:
        noise_scale.add(float(rows[:, 3].sum()), int(rows[:, 4].sum()), grad_norm, record.num_targets)
        metrics["train/noise_scale_tokens"] = noise_scale.tokens
    return metrics, int(longest_skip)


def mfu_metrics(metrics: Metrics, facts: ModelFacts, sequence_length: int, peak_flops: float | None) -> Metrics:
    """Use of the device's peak in both conventions; null where the peak or the rate is not known.

    Args:
        metrics: with the rate.
        facts: size of the model.
        sequence_length: in tokens.
        peak_flops: dense peak of one device in FLOP/s.
    """
    rate = metrics["throughput/tokens_per_s_per_device"]
    names = {"throughput/mfu": False, "throughput/mfu_causal": True}
    if peak_flops is None or rate is None:
        return dict.fromkeys(names)
    return {
        name: rate * facts.flops_per_token(sequence_length, causal=causal) / peak_flops
        for name, causal in names.items()
    }


def sum_over_ranks(sums: torch.Tensor, ranks: Ranks) -> list[float]:
    """Add up a vector over all ranks, as numbers; waits for the device."""
    return gather_rows(sums.double().cpu(), ranks).sum(dim=0).tolist()


def peak_memory_gib(device: torch.device) -> float:
    """Highest memory use of this process so far: allocated on CUDA, resident on a CPU; GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def gather_rows(row: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """Vectors of all ranks, on the host, in rank order, so that sums over them come out the same everywhere."""
    if ranks.world_size == 1:
        return row[None]
    rows = [torch.empty_like(row) for _ in range(ranks.world_size)]
    dist.all_gather(rows, row)
    return torch.stack(rows)


class MetricsFile:
    """metrics.jsonl: one JSON object per logged step, each step once."""

    def __init__(self, path: Path, last_step: int) -> None:
        """Open the file for appending; lines beyond ``last_step`` move to metrics.discarded.jsonl.

        They belong to steps that an earlier attempt took after the checkpoint from which this one continues.
        """
        if path.exists():
            _discard_after(path, last_step)
        # No buffer: a killed run loses no finished line.
        self._file = path.open("ab", buffering=0)

    def write(self, step: int, metrics: Metrics) -> None:
        """Append one step's metrics; numbers that are not finite become null.

        Raises:
            UserError: the disk is full, say.
        """
        line = (json.dumps({"step": step} | finite_or_none(metrics)) + "\n").encode()
        try:
            # The next attempt takes out a line that is not whole.
            reason = None if self._file.write(line) == len(line) else os.strerror(errno.ENOSPC)
        except OSError as error:
            reason = error.strerror
        if reason is not None:
            raise UserError(
                f"{self._file.name} cannot be written: {reason}; free some space, then run again to continue from the "
                "last checkpoint."
            )

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def finite_or_none(metrics: Metrics) -> Metrics:
    """The metrics with None in place of NaN and infinity, which JSON does not have."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in metrics.items()
    }


def _discard_after(path: Path, last_step: int) -> None:
    kept: list[str] = []
    discarded: list[str] = []
    for line in path.read_text().splitlines():
        (kept if _step_of(line) <= last_step else discarded).append(line + "\n")
    if not discarded:
        return
    with path.with_name("metrics.discarded.jsonl").open("a") as file:
        file.writelines(discarded)
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text("".join(kept))
    os.replace(temporary, path)


def _step_of(line: str) -> float:
    try:
        values: dict[str, Any] = json.loads(line)
        return float(values["step"])
    except (ValueError, KeyError):
        # The last line of a process that was killed while writing.
        return math.inf


def sum_integers_over_ranks(value: int, ranks: Ranks) -> int:
    """Add up a signed 64-bit integer over all ranks, wrapping around."""
    total = torch.tensor([value], dtype=torch.int64)
    if ranks.world_size > 1:
        dist.all_reduce(total)
    return int(total.item())
