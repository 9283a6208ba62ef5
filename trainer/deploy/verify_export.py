"""An exported model beside the trained one: the same samples, each in its own runtime, the task's own metrics."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sharding.engine import Batch
from sharding.ranks.errors import UserError
from trainer.deploy.held_out import HeldOut
from trainer.deploy.model_call import Compute, ModelCall, answered_by
from trainer.deploy.signature import Dtype, Quality
from trainer.tasks.task import Metric, Sums, Task

MAX_ERROR = 1e-4
"""How far logits in fp32 may be apart."""

MAX_LOSS = 0.005
"""How much worse a metric may be: half a point of what is better when it is higher, half a percent of all others."""


@dataclass(frozen=True)
class Comparison:
    """Two models on the same samples.

    Attributes:
        max_abs_error: largest difference between two logits, infinity where one of both alone is not finite.
        trained: metrics of the one.
        exported: metrics of the other.
    """

    max_abs_error: float
    trained: dict[str, Metric]
    exported: dict[str, Metric]


def compare(task: Task, model: nn.Module, call: ModelCall, exported: Compute, held_out: HeldOut) -> Comparison:
    """Run both models on all samples, on one sample alone, and where samples are texts on half of one.

    Args:
        task: says what is computed.
        model: the trained model.
        call: how the task calls it.
        exported: the other model, or any that takes the same inputs.
        held_out: the samples.
    """
    of_trained, of_exported = Scores(task), Scores(task)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        errors = [
            max_difference(_logits(model(**inputs, **call.constants)), exported(inputs)) for inputs in _sizes(call)
        ]
        for batch in held_out.batches():
            first = of_trained.add(model, batch)
            with answered_by(exported, model, call):
                errors.append(max_difference(first, of_exported.add(model, batch)))
    return Comparison(max(errors), of_trained.metrics(), of_exported.metrics())


def quality(comparison: Comparison, held_out: HeldOut, monitor: str) -> Quality:
    """What is written down of a comparison.

    Args:
        comparison: of both models.
        held_out: the samples.
        monitor: the metric that the run is judged by, ``evaluation.monitor``.
    """
    error, names = comparison.max_abs_error, comparison.trained
    # Of a set's or a source's metric, or of averaged weights', the metric itself.
    last = monitor.rpartition("/")[2].removeprefix("ema_")
    metric = next((name for name in (monitor, last, "loss", *names) if name in names), None)
    return Quality(
        split=held_out.split,
        num_samples=held_out.num_samples,
        max_abs_error=error if math.isfinite(error) else None,
        metric=None if held_out.split == "generated" else metric,
        trained=_values(comparison.trained),
        exported=_values(comparison.exported),
    )


def refuse_loss(
    comparison: Comparison, found: Quality, dtype: Dtype, *, is_quantized: bool = False, earlier: Quality | None = None
) -> None:
    """Refuse an exported model that is not what was trained.

    Args:
        comparison: of both models.
        found: what is written down of it.
        dtype: of the exported one.
        is_quantized: whether its weights are.
        earlier: of the export that a quantised one is made of, what was found beside the trained model; what that has
            lost counts too. None where nobody has compared them.

    Raises:
        UserError: logits in fp32 are more than ``MAX_ERROR`` apart, or the metric of another format is worse by more
            than ``MAX_LOSS``.
    """
    name = "a quantised model" if is_quantized else dtype
    if dtype == "fp32" and not is_quantized:
        if comparison.max_abs_error <= MAX_ERROR:
            return
        raise UserError(
            f"the exported model is not the trained one: logits differ by up to {comparison.max_abs_error:.3g} on "
            f"{found.num_samples} samples, and at most {MAX_ERROR:g} is rounding; nothing was written, and "
            "--accept-loss would write it all the same."
        )
    if found.metric is None:
        raise UserError(
            "the run's own samples are not there, so that nobody knows what is lost by the format of the weights "
            f"({name}); restore the data, give --dtype fp32, or --accept-loss."
        )
    before, after = comparison.trained[found.metric], comparison.exported[found.metric]
    if not math.isfinite(before.value) and not math.isfinite(after.value):
        return
    is_share = before.better == "higher"
    lost = _lost(earlier, found.metric, is_share=is_share)
    difference = before.value - after.value if is_share else after.value - before.value
    if difference <= (MAX_LOSS - lost) * (1.0 if is_share else abs(before.value)):
        return
    limit = f"{100 * MAX_LOSS:g} points" if is_share else f"{100 * MAX_LOSS:g} %"
    raise UserError(
        f"{name} costs too much: {found.metric} is {after.value:.6g} in place of {before.value:.6g} on "
        f"{found.num_samples} {found.where}, and at most {limit} is allowed"
        f"{f', of which the export has lost {100 * lost:.3g} already' if lost else ''}; give another format of the "
        "weights, or --accept-loss."
    )


def _lost(earlier: Quality | None, metric: str, *, is_share: bool) -> float:
    """How much worse an export is than the trained model: as a difference, or as a part of the trained one's metric.

    What it may be better by on those samples is no allowance on others.
    """
    values = (None, None) if earlier is None else (earlier.trained.get(metric), earlier.exported.get(metric))
    trained, exported = values
    if earlier is None or earlier.metric is None or trained is None or exported is None:
        return 0.0
    return max(0.0, trained - exported if is_share else (exported - trained) / max(abs(trained), 1e-12))


def _sizes(call: ModelCall) -> list[dict[str, torch.Tensor]]:
    """Inputs of other sizes than those that a model was traced by, which it must not have taken for the only ones."""
    alone = {key: value[:1] for key, value in call.inputs.items()}
    if not call.texts:
        return [alone]
    return [
        alone,
        {key: value[:, : -(-value.shape[1] // 2)] if key in call.texts else value for key, value in alone.items()},
    ]


class Scores:
    """A task's sums over batches."""

    def __init__(self, task: Task) -> None:
        """Nothing is summed yet."""
        self._task = task
        self._added: Sums = {}
        self._kept: dict[str, list[torch.Tensor]] = {}

    def add(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Evaluate a batch, and give the model's logits."""
        made: list[torch.Tensor] = []
        hook = model.register_forward_hook(lambda _module, _args, output: made.append(_logits(output)))
        # Whatever a pass draws, both models draw alike.
        torch.manual_seed(0)
        try:
            sums = self._task.evaluate(self._task.forward(model, batch), batch)
        finally:
            hook.remove()
        for name, value in sums.items():
            if name in self._task.kept:
                self._kept.setdefault(name, []).append(value.double())
            else:
                self._added[name] = self._added.get(name, torch.zeros(())) + value.double()
        return made[0]

    def metrics(self) -> dict[str, Metric]:
        """The task's metrics."""
        return self._task.metrics(self._added | {name: torch.cat(parts) for name, parts in self._kept.items()})


def _logits(made: Any) -> torch.Tensor:
    logits: torch.Tensor = getattr(made, "logits", made)
    return logits.float()


def max_difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """Largest difference between two logits, infinity where one of both alone is not finite."""
    if one.shape != other.shape or not torch.equal(one.isfinite(), other.isfinite()):
        return math.inf
    is_finite = one.isfinite()
    difference = (one[is_finite] - other[is_finite]).abs()
    return float(difference.max()) if difference.numel() else 0.0


def _values(metrics: Mapping[str, Metric]) -> dict[str, float | None]:
    return {name: metric.value if math.isfinite(metric.value) else None for name, metric in metrics.items()}
