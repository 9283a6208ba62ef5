"""Samples that a run has not trained on, as its task batches them; drawn ones where the run's own are not there."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from sharding.engine import Batch
from sharding.ranks.errors import UserError
from trainer.config.stages import config_of_step
from trainer.data.any_samples import prepared_samples
from trainer.data.loader import evaluation_batches
from trainer.data.prepared import open_corpus
from trainer.data.samples import Samples
from trainer.deploy.allowed_code import AllowedCode
from trainer.deploy.trained_model import TrainedModel
from trainer.tasks.causal_lm import CausalLanguageModelling
from trainer.tasks.classification import TokenClassification
from trainer.tasks.masked_lm import MaskedLanguageModelling
from trainer.tasks.regression import Regression
from trainer.tasks.supervised import SupervisedTask
from trainer.tasks.task import Task

_SPLITS: tuple[Literal["validation", "test", "train"], ...] = ("validation", "test", "train")
_MOST, _FEWEST_ROWS, _FEWEST_SEQUENCES = 1024, 8, 2
_FEWEST_SCORED_ROWS = 256
"""Where scores are compared: of fewer, one row is more than the half point that they may differ by."""
_PARAMETER_TOKENS = 2**36
"""Parameters x tokens that are computed with, some ten seconds of a processor's."""
_TOKENS, _LOGITS = 2**14, 2**26
"""The most of a batch."""


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Samples in batches, which can be made as often as they are needed.

    Attributes:
        split: where they come from; see ``trainer.deploy.signature.Quality``.
        num_samples: how many there are.
        batches: makes the batches, all of as many rows.
    """

    split: Literal["validation", "test", "train", "other", "generated"]
    num_samples: int
    batches: Callable[[], Iterator[Batch]]


def find_held_out(trained: TrainedModel, allowed: AllowedCode, *, is_scored: bool) -> HeldOut:
    """Samples of the run's validation split, else of another one, at equal distances.

    Args:
        trained: the run's model.
        allowed: the Python code that may run for it.
        is_scored: whether metrics will be compared, and not logits alone.

    Raises:
        UserError: there are none, and the task is the user's own, so that nobody else knows what samples are like.
    """
    facts, num_parameters = trained.facts, sum(p.numel() for p in trained.model.parameters())
    num_tokens = facts.sequence_length or 1
    is_packed = isinstance(trained.task, CausalLanguageModelling | MaskedLanguageModelling)
    affordable = _PARAMETER_TOKENS // max(num_parameters * num_tokens, 1)
    fewest = _FEWEST_SEQUENCES if is_packed else _FEWEST_SCORED_ROWS if is_scored else _FEWEST_ROWS
    num_samples = min(max(affordable, fewest), _MOST)
    num_outputs = (facts.vocab_size or 1) if is_packed else 1
    micro_size = max(1, min(64, _TOKENS // num_tokens, _LOGITS // (num_tokens * num_outputs)))
    try:
        samples = _samples_of(trained, allowed)
    except UserError:
        if not isinstance(trained.task, SupervisedTask | CausalLanguageModelling | MaskedLanguageModelling):
            raise
        return HeldOut("generated", micro_size, lambda: iter([_drawn_batch(trained, micro_size)]))
    split = next(name for name in _SPLITS if samples.num_samples(name))
    num_samples = min(num_samples, samples.num_samples(split))

    def batches() -> Iterator[Batch]:
        found = evaluation_batches(
            samples, split, micro_size=micro_size, dp_rank=0, dp_degree=1, max_samples=num_samples, spread=True
        )
        return (exported_batch(trained.task, one.samples, one.positions) for one in found)

    return HeldOut(split, num_samples, batches)


def _samples_of(trained: TrainedModel, allowed: AllowedCode) -> Samples:
    """The samples that the run was trained on.

    Raises:
        UserError: they are not there, are others now, or are made by code that is not allowed.
    """
    reader = trained.reader
    config = config_of_step(trained.run_config, reader.manifest.training.step)
    allowed.check_samples(config, f"checkpoint {reader.folder}")
    prepared = open_corpus(config, reader.manifest.data_fingerprint)
    if prepared.fingerprint != reader.manifest.data_fingerprint:
        raise UserError(
            f"checkpoint {reader.folder} was trained on other data than {prepared.folder}; restore the data."
        )
    return prepared_samples(prepared, config.data)


def exported_batch(task: Task, samples: Batch, positions: torch.Tensor) -> Batch:
    """A batch for evaluation, such that what is exported takes it.

    Args:
        task: makes it.
        samples: as they were read.
        positions: of the samples in their split, int64 [samples].
    """
    batch = task.make_batch(samples, positions, training=False)
    if isinstance(task, CausalLanguageModelling):
        # What is exported reads one text from its beginning, whatever training packed together.
        batch.pop("position_ids", None)
    if isinstance(task, MaskedLanguageModelling):
        # Which the task leaves out where no row is short; what is exported takes the same inputs for all.
        batch.setdefault("attention_mask", torch.ones_like(batch["input_ids"]))
    return batch


def _drawn_batch(trained: TrainedModel, num_rows: int) -> Batch:
    """Numbers in the form of the run's samples, which have no right answers."""
    facts, task = trained.facts, trained.task
    draw = torch.Generator().manual_seed(0)
    length = facts.sequence_length or 1

    def whole(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(high, shape, generator=draw)

    positions = torch.arange(num_rows)
    if not isinstance(task, SupervisedTask):
        tokens = whole(facts.vocab_size or 1, num_rows, length + 1)
        samples = {"tokens": tokens, "num_tokens": torch.full((num_rows,), length + 1)}
        return exported_batch(trained.task, samples, positions)
    samples = {}
    if facts.vocab_size is not None:
        samples["input_ids"] = whole(facts.vocab_size, num_rows, length)
        samples["num_tokens"] = torch.cat([torch.tensor([length]), 1 + whole(length, num_rows - 1)])
    if facts.categories:
        columns = [whole(num_values, num_rows) for _, num_values in facts.categories]
        samples["categories"] = torch.stack(columns, dim=1)
    for name, sizes in (
        ("features", (facts.num_features,)),
        ("pixel_values", facts.image_shape),
        ("input_values", (facts.num_audio_samples,)),
    ):
        if sizes is not None and all(sizes):
            samples[name] = torch.randn((num_rows, *sizes), generator=draw)
    if isinstance(task, Regression):
        samples["labels"] = torch.randn(num_rows, generator=draw)
    elif isinstance(task, TokenClassification):
        samples["labels"] = whole(len(facts.classes), num_rows, length)
    else:
        samples["labels"] = whole(len(facts.classes), num_rows)
    return exported_batch(trained.task, samples, positions)
