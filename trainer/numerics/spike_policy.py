"""Steps whose numbers are bad: who is notified, what is skipped, and when the run rolls back."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from sharding.ranks.errors import RunFailure, UserError
from sharding.ranks.object_exchange import gather_rows
from sharding.ranks.process_group import Ranks
from trainer.checkpoint.training_state import TrainingState
from trainer.config import RunConfig
from trainer.config.data import SampleRange
from trainer.data.skipped_samples import SkippedSamples
from trainer.numerics.spike_detector import Spike, SpikeDetector
from trainer.trackers.observers import Observers

_JUDGE_AT_LEAST_EVERY_STEPS = 100

FindDocuments = Callable[[list[SampleRange]], list[dict[str, Any]]]
"""The documents that ranges of global sample positions touch."""


@dataclass(frozen=True)
class TakenStep:
    """A step that was computed: device scalars that nobody has waited for yet.

    Attributes:
        step: its number.
        first_sample: samples of the corpus that were consumed before it.
        loss_sum: this rank's summed loss; 0 where it does not count.
        grad_norm: global norm before clipping.
        num_targets: valid targets of the global batch.
    """

    step: int
    first_sample: int
    loss_sum: torch.Tensor
    grad_norm: torch.Tensor
    num_targets: int


@dataclass(frozen=True)
class BadStep:
    """A step with a bad number.

    Attributes:
        step: its number.
        first_sample: samples of the corpus that were consumed before it.
        spike: how far out it is; None where loss or gradient norm is not finite.
    """

    step: int
    first_sample: int
    spike: Spike | None


class SpikePolicy:
    """Judges every step; all ranks come to the same verdict, since they judge the same bits.

    Under ``warn`` and ``rollback`` steps are judged some at a time, at log intervals and before each save, so that no
    step waits for the device. Under ``skip`` each is judged before it is applied.
    """

    def __init__(
        self, config: RunConfig, ranks: Ranks, observers: Observers, find_documents: FindDocuments, *, scales_loss: bool
    ) -> None:
        """Judge by the settings.

        Args:
            config: the run.
            ranks: this rank's place.
            observers: who is notified.
            find_documents: for the audit; called on rank 0 alone.
            scales_loss: whether a step that is not finite may be the loss scale's doing, and nothing to speak of.
        """
        self._settings = config.faults
        self._global_size = config.batch.global_size
        self._ranks = ranks
        self._observers = observers
        self._find_documents = find_documents
        self._scales_loss = scales_loss
        self._detector = self._new_detector([], [])
        self._waiting: list[TakenStep] = []
        self._num_skipped_in_a_row = 0

    @property
    def judges_at_once(self) -> bool:
        """Whether a step is judged before it is applied."""
        return self._settings.spike_policy == "skip"

    @property
    def is_overdue(self) -> bool:
        """Whether so many steps wait that they should be judged now."""
        return len(self._waiting) >= _JUDGE_AT_LEAST_EVERY_STEPS

    def restore(self, training: TrainingState) -> None:
        """Go on from a checkpoint; what waits to be judged is forgotten."""
        self._detector = self._new_detector(training.recent_losses, training.recent_grad_norms)
        self._waiting = []

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps; nothing may be waiting."""
        return {"recent_losses": self._detector.losses, "recent_grad_norms": self._detector.grad_norms}

    def add(self, taken: TakenStep) -> None:
        """Take in a step that was applied, or skipped for not being finite."""
        if self._settings.spike_policy not in ("off", "skip"):
            self._waiting.append(taken)

    def judge_at_once(self, taken: TakenStep) -> BadStep | None:
        """Judge one step before it is applied; waits for the device. Every rank must call it.

        Raises:
            RunFailure: as many batches were skipped in a row as may be.
        """
        ((loss, grad_norm),) = self._read([taken])
        bad = self._judge(taken, loss, grad_norm)
        if bad is None:
            self._accept(loss, grad_norm)
            self._num_skipped_in_a_row = 0
            return None
        self._num_skipped_in_a_row += 1
        if self._num_skipped_in_a_row > self._settings.max_consecutive_skips:
            raise RunFailure(
                f"{self._num_skipped_in_a_row} batches in a row were bad at step {bad.step}, the last with "
                f"{_what(bad)}, after {self._settings.max_consecutive_skips} were skipped "
                f"(faults.max_consecutive_skips): it is not the data; lower optimizer.lr or continue from an older "
                "checkpoint."
            )
        return bad

    def skip_configured(self, restored: TrainingState, ranges: Sequence[SampleRange]) -> TrainingState:
        """``skip_configured``, and an event where that is more than the checkpoint skips already."""
        skipping = skip_configured(restored, ranges)
        if skipping.skipped_samples != list(SkippedSamples(restored.skipped_samples).ranges):
            self._record_skipped(restored.step, [(first, end) for first, end in ranges])
        return skipping

    def skip(self, bad: BadStep, training: TrainingState) -> TrainingState:
        """Say that a step's samples are skipped; returns the state from which it is taken again with others."""
        samples = self._samples_of(bad, training)
        self._record(bad, training, "skip")
        self._record_skipped(bad.step, samples)
        self._notify(bad, training, "the step is taken again with the samples that follow")
        return _without(training, samples)

    def judge(self, training: TrainingState, load_until: Callable[[int], TrainingState | None]) -> TrainingState | None:
        """Judge the steps that wait, in order; every rank must call it.

        Args:
            training: the state after them.
            load_until: loads the newest checkpoint of a step or before; None where there is none.

        Returns:
            The state from which the run goes on if it has rolled back to a checkpoint, else None.

        Raises:
            RunFailure: the run has rolled back as often as it may.
        """
        waiting, self._waiting = self._waiting, []
        bad_steps: list[BadStep] = []
        for taken, (loss, grad_norm) in zip(waiting, self._read(waiting), strict=True):
            bad = self._judge(taken, loss, grad_norm)
            if bad is not None and bad.spike is not None and self._settings.spike_policy == "rollback":
                restored = self._roll_back(bad, training, load_until)
                if restored is not None:
                    return restored
            elif bad is not None:
                self._record(bad, training, "none" if bad.spike else "not_applied")
                bad_steps.append(bad)
            self._accept(loss, grad_norm)
        if bad_steps:
            worst = max(bad_steps, key=lambda bad: math.inf if bad.spike is None else bad.spike.deviations)
            done = "nothing was done about it" if worst.spike else "all ranks skipped it"
            self._notify(
                worst, training, done + (f" (and {len(bad_steps) - 1} more steps)" if len(bad_steps) > 1 else "")
            )
        return None

    def _roll_back(
        self, bad: BadStep, training: TrainingState, load_until: Callable[[int], TrainingState | None]
    ) -> TrainingState | None:
        settings, num_rollbacks = self._settings, training.num_rollbacks
        if num_rollbacks >= settings.max_rollbacks:
            raise RunFailure(
                f"at step {bad.step} {_what(bad)}, and the run has rolled back {num_rollbacks} times before "
                f"(faults.max_rollbacks={settings.max_rollbacks}); look at the documents in events.jsonl, lower "
                "optimizer.lr, or raise faults.max_rollbacks."
            )
        restored = load_until(bad.step - settings.rollback_skip_steps)
        if restored is None:
            self._record(bad, training, "no_checkpoint")
            self._notify(bad, training, "there is no checkpoint from before it to roll back to")
            return None
        samples = self._samples_of(bad, training, settings.rollback_skip_steps)
        self._record(bad, training, "rollback")
        self._observers.event("rollback", bad.step, to_step=restored.step, num_rollbacks=num_rollbacks + 1)
        self._record_skipped(bad.step, samples)
        self._notify(bad, training, f"the run rolls back to step {restored.step} and skips them", samples)
        restored = restored.model_copy(update={"num_rollbacks": num_rollbacks + 1})
        # Also what was skipped since that checkpoint was saved.
        return _without(restored, [*training.skipped_samples, *samples])

    def _samples_of(self, bad: BadStep, training: TrainingState, num_steps: int = 1) -> list[SampleRange]:
        """Global positions of the samples of a bad step and of the steps just before it, ``num_steps`` in all."""
        end = bad.first_sample + self._global_size
        return SkippedSamples(training.skipped_samples).ranges_between(end - num_steps * self._global_size, end)

    def _record(self, bad: BadStep, training: TrainingState, action: str) -> None:
        """Write the event of a bad step; ``training`` skips what was skipped when it was taken."""
        if not self._observers.is_watched:
            return
        samples = self._samples_of(bad, training)
        details: dict[str, Any] = {"action": action}
        if bad.spike is not None:
            details |= asdict(bad.spike) | {"threshold": self._settings.spike_threshold}
        kind = "nonfinite" if bad.spike is None else "spike"
        self._observers.event(kind, bad.step, **details, samples=samples, documents=self._find_documents(samples))

    def _record_skipped(self, step: int, samples: list[SampleRange]) -> None:
        if self._observers.is_watched:
            documents = self._find_documents(samples)
            self._observers.event("samples_skipped", step, samples=samples, documents=documents)

    def _notify(
        self, bad: BadStep, training: TrainingState, done: str, samples: list[SampleRange] | None = None
    ) -> None:
        """Say in a line what was bad, and what was done."""
        ranges = ", ".join(f"{first}-{end - 1}" for first, end in samples or self._samples_of(bad, training))
        self._observers.warn(f"step {bad.step}: {_what(bad)}; samples {ranges} (events.jsonl names them); {done}")

    def _judge(self, taken: TakenStep, loss: float, grad_norm: float) -> BadStep | None:
        is_finite = math.isfinite(loss) and math.isfinite(grad_norm)
        spike = None
        # Under fp16 the gradients of an ordinary loss may overflow; those of one that leaps are no fault of the scale.
        if is_finite or (self._scales_loss and math.isfinite(loss)):
            spike = self._detector.judge(loss, grad_norm)
        if spike is not None:
            return BadStep(taken.step, taken.first_sample, spike)
        return None if is_finite or self._scales_loss else BadStep(taken.step, taken.first_sample, None)

    def _accept(self, loss: float, grad_norm: float) -> None:
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self._detector.accept(loss, grad_norm)

    def _read(self, taken: list[TakenStep]) -> list[tuple[float, float]]:
        """Mean loss over the global batch, and gradient norm, of each step: the same bits on every rank."""
        if not taken:
            return []
        scalars = [step.loss_sum.double() for step in taken] + [step.grad_norm.double() for step in taken]
        # Waits for the device, once for all steps.
        rows = gather_rows(torch.stack(scalars).cpu(), self._ranks)
        loss_sums, grad_norms = rows[:, : len(taken)].sum(dim=0).tolist(), rows[0, len(taken) :].tolist()
        losses = [loss_sum / max(step.num_targets, 1) for step, loss_sum in zip(taken, loss_sums, strict=True)]
        return list(zip(losses, grad_norms, strict=True))

    def _new_detector(self, losses: list[float], grad_norms: list[float]) -> SpikeDetector:
        settings = self._settings
        return SpikeDetector(
            settings.spike_threshold, settings.spike_window_steps, settings.spike_warmup_steps, losses, grad_norms
        )


def skip_configured(restored: TrainingState, ranges: Sequence[SampleRange]) -> TrainingState:
    """A checkpoint's state, with the samples of ``data.skip_samples`` skipped from here on.

    Raises:
        UserError: the checkpoint has gone beyond some of them.
    """
    skipping = _without(restored, ranges)
    before, after = SkippedSamples(restored.skipped_samples), SkippedSamples(skipping.skipped_samples)
    position = before.position(restored.num_corpus_samples)
    if not before.agrees_before(after, position):
        raise UserError(
            f"data.skip_samples={[list(pair) for pair in ranges]} names samples before position {position}, which "
            f"the checkpoint of step {restored.step} has gone beyond; name later ones, or start from an older "
            "checkpoint."
        )
    return skipping


def _without(training: TrainingState, ranges: Iterable[SampleRange]) -> TrainingState:
    skipped = SkippedSamples(training.skipped_samples).without(ranges)
    return training.model_copy(update={"skipped_samples": list(skipped.ranges)})


def _what(bad: BadStep) -> str:
    if bad.spike is None:
        return "loss or gradient norm is not finite"
    spike = bad.spike
    return (
        f"{spike.quantity} {spike.value:.4g} is {spike.deviations:,.1f} robust standard deviations above the recent "
        f"median of {spike.median:.4g}"
    )
