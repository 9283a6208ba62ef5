"""The plots of a run, named once for the report and the wandb dashboard; imports no torch."""

import fnmatch
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Panel:
    """One plot over optimizer steps.

    Attributes:
        title: what is plotted.
        metrics: names as in metrics.jsonl; ``*`` stands for the number of a node, or the name of a class.
        unit: unit of the vertical axis.
        scale: ``log`` where values span orders of magnitude.
        stacked: whether the values are shares that add up to 1.
    """

    title: str
    metrics: tuple[str, ...]
    unit: str
    scale: Literal["linear", "log"] = "linear"
    stacked: bool = False

    def matching(self, names: Iterable[str]) -> list[str]:
        """Those of the given metric names that belong here, in the panel's order, nodes by number."""
        known = sorted(set(names), key=_by_number)
        return [name for pattern in self.metrics for name in known if fnmatch.fnmatchcase(name, pattern)]


@dataclass(frozen=True)
class PanelSection:
    """Plots that are looked at together.

    Attributes:
        title: heading.
        panels: its plots.
    """

    title: str
    panels: tuple[Panel, ...]


SECTIONS = (
    PanelSection("Loss", (Panel("Training loss", ("train/loss",), "per target"),)),
    PanelSection(
        "Evaluation",
        (
            Panel("Held-out loss", ("eval/loss", "eval/ema_loss"), "per target"),
            Panel("Held-out perplexity", ("eval/perplexity", "eval/ema_perplexity"), "perplexity", scale="log"),
            Panel("Held-out bits per byte", ("eval/bits_per_byte", "eval/ema_bits_per_byte"), "bits"),
            Panel("Accuracy", ("eval/accuracy", "eval/f1_micro", "eval/ema_accuracy"), "share of targets"),
            Panel(
                "Precision, recall and F1 over classes",
                ("eval/precision_macro", "eval/recall_macro", "eval/f1_macro", "eval/ema_f1_macro"),
                "mean over classes",
            ),
            Panel("F1 by class", ("eval/f1/*",), "F1"),
            Panel("Area under the ROC curve", ("eval/auroc", "eval/ema_auroc"), "area"),
            Panel("Mean squared error", ("eval/mse", "eval/ema_mse"), "squared", scale="log"),
            Panel("Mean absolute error", ("eval/mae", "eval/ema_mae"), "as labels"),
            Panel("Coefficient of determination", ("eval/r2", "eval/ema_r2"), "R2"),
        ),
    ),
    PanelSection(
        "Learning rate and gradient norm",
        (
            Panel("Learning rate", ("train/learning_rate",), "per step"),
            Panel("Gradient norm before clipping", ("train/grad_norm",), "L2 norm", scale="log"),
            Panel("Skipped steps", ("train/skipped_steps",), "steps so far"),
            Panel("Pruned weights", ("train/sparsity",), "share of those that may be"),
            Panel("Loss scale of fp16", ("train/loss_scale",), "factor", scale="log"),
            Panel("Gradient noise scale", ("train/noise_scale_tokens",), "tokens", scale="log"),
        ),
    ),
    PanelSection(
        "Throughput",
        (
            Panel("Tokens per second", ("throughput/tokens_per_s",), "tokens/s"),
            Panel("Tokens per second and device", ("throughput/tokens_per_s_per_device",), "tokens/s"),
            Panel("Step time", ("throughput/step_time_s",), "s"),
            Panel("Model FLOPs utilization", ("throughput/mfu", "throughput/mfu_causal"), "share of the peak"),
            Panel("What the slowest rank costs", ("throughput/slowest_rank_ratio",), "step time / without it"),
        ),
    ),
    PanelSection("Memory", (Panel("Peak memory of a rank", ("memory/peak_gib",), "GiB"),)),
    PanelSection(
        "Time shares",
        (
            Panel(
                "Where time goes",
                (
                    "time/training_fraction",
                    "time/data_wait_fraction",
                    "time/evaluation_fraction",
                    "time/saving_fraction",
                ),
                "share of wall time",
                stacked=True,
            ),
            Panel("Saving checkpoints", ("checkpoint/blocking_s", "checkpoint/write_s"), "s"),
            Panel("Goodput so far, over all attempts", ("goodput/fraction",), "share of wall time"),
        ),
    ),
    PanelSection(
        "System",
        (
            Panel("Processor use by node", ("system/node-*/cpu_percent",), "%"),
            Panel("Memory use by node", ("system/node-*/memory_percent",), "%"),
            Panel("GPU use by node", ("system/node-*/gpu_percent",), "%"),
            Panel("GPU memory use by node", ("system/node-*/gpu_memory_percent",), "%"),
        ),
    ),
)


def _by_number(name: str) -> list[str | int]:
    # node-10 comes after node-9, since splitting by a captured group alternates text and digits and lists compare.
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
