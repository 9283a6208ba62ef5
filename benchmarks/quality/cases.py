"""What is trained, which number is looked at, and what it is compared with."""

from dataclasses import dataclass
from typing import Literal

BaselineName = Literal["linear", "tf-idf", "unigram-entropy"]


@dataclass(frozen=True)
class Case:
    """A configuration that is trained once for each seed.

    Attributes:
        config: its name in ``configs/``.
        metric: what ``shardline evaluate`` is asked for.
        split: where.
        num_seeds: as many runs by default.
        baseline: what is printed beside it.
        at_least: the mean over seeds is to reach it; None where there is no such bar.
        points_below_baseline: the mean may be so far below the baseline; None where that is no bar.
    """

    config: str
    metric: str
    split: str = "test"
    num_seeds: int = 5
    baseline: BaselineName | None = None
    at_least: float | None = None
    points_below_baseline: float | None = None


CASES: dict[str, Case] = {
    "digits-mlp": Case("digits_mlp", "accuracy", baseline="linear", at_least=0.97),
    "digits-cnn": Case("digits_cnn", "accuracy", baseline="linear", at_least=0.985),
    "table": Case("table_regression", "r2", baseline="linear"),
    "ratings": Case("ratings", "r2"),
    "tones": Case("tones_audio", "accuracy"),
    "text": Case("stdlib_lstm", "accuracy", baseline="tf-idf", points_below_baseline=0.05),
    "masked-lm": Case("stdlib_bert_mlm", "loss", "validation", 3, "unigram-entropy"),
}
"""Every configuration of its own; transfer is another matter, see ``TRANSFER``."""

DISTILLATION = "distillation"
"""Triples of runs with one seed: a teacher, a student that learns from it, and the same student alone."""

NUM_TRIPLES = 12
TEACHER_CONFIG = "digits_cnn"
TEACHER_OVERRIDES = ("data.validation_fraction=0.633",)
"""The teacher has the student's training rows, and no others."""
STUDENT_CONFIG = "distill_digits"

TRANSFER = "transfer"
"""Pairs of runs with one seed: a masked language model and then a classifier on it, and the classifier alone."""

NUM_PAIRS = 8
TRANSFER_BASE = "stdlib_bert_mlm"
TRANSFER_CONFIG = "stdlib_classify_transfer"
