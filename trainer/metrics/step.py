"""Metrics of a run: gathered without waiting for the device, written at log intervals."""

from dataclasses import dataclass

import torch

from sharding.ranks.object_exchange import gather_rows
from sharding.ranks.process_group import Ranks
from trainer.metrics.clock import ThroughputClock
from trainer.metrics.file import Metrics
from trainer.metrics.goodput import Category
from trainer.metrics.noise_scale import NoiseMeasurement, NoiseScale
from trainer.metrics.stragglers import slowest_rank
from trainer.metrics.system_metrics import NUM_SYSTEM_VALUES, SystemMeter, peak_memory_gib, system_metrics
from trainer.model.models import ModelFacts


@dataclass
class StepRecord:
    """What one step leaves behind: device scalars that nobody has waited for yet.

    Attributes:
        loss_sum: this rank's summed loss in nats, a scalar; 0 where it does not count.
        num_targets: valid targets of the global batch.
        grad_norm: global L2 norm of the mean loss's gradient before clipping, a scalar, equal on all ranks.
        learning_rate: rate of the step.
        loss_scale: present loss scale under fp16, a scalar; None elsewhere.
        noise: measurement of the gradient noise, where the step has one.
    """

    loss_sum: torch.Tensor
    num_targets: int
    grad_norm: torch.Tensor
    learning_rate: float
    loss_scale: torch.Tensor | None = None
    noise: NoiseMeasurement | None = None


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
    waited = clock.spent_s(Category.DATA_WAIT) / elapsed_s
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
    """Use of the device's peak in both conventions; null where the peak, the rate or the arithmetic is not known.

    Args:
        metrics: with the rate.
        facts: size of the model.
        sequence_length: in tokens.
        peak_flops: dense peak of one device in FLOP/s.
    """
    rate = metrics["throughput/tokens_per_s_per_device"]
    names = {"throughput/mfu": False, "throughput/mfu_causal": True}
    if peak_flops is None or rate is None or not facts.is_per_token:
        return dict.fromkeys(names)
    return {
        name: rate * facts.flops_per_token(sequence_length, causal=causal) / peak_flops
        for name, causal in names.items()
    }
