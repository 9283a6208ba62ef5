"""Samples that an exported model is compared on with what was made of it."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

from sharding.engine import Batch
from trainer.data.any_samples import prepared_samples
from trainer.data.loader import evaluation_batches
from trainer.data.prepared import open_prepared
from trainer.deploy.compare import Reference
from trainer.deploy.held_out import HeldOut, exported_batch
from trainer.evaluation.subject import Asked, Subject
from trainer.model.models import build_model_on_meta
from trainer.runtime.randomness import seed_sample
from trainer.tasks.registry import configured_task

_MAX_SAMPLES = 2048
_MAX_TOKENS = 2**18
_BATCH_SIZE = 32


def reference_of(asked: Asked, subject: Subject) -> Reference:
    """The task of a run or of an exported folder, and samples, at equal distances where there are more than 2,048.

    Of texts there are as many as have 262,144 tokens, if they are fewer.

    Args:
        asked: what was asked for.
        subject: what was found.
    """
    config = subject.config
    prepared = open_prepared(subject.prepared_dir, config.data)
    assert prepared is not None, "it was prepared before"
    samples = prepared_samples(prepared, config.data)
    limit = max(min(_MAX_SAMPLES, _MAX_TOKENS // (samples.facts.sequence_length or 1)), 1)
    num_samples = min(samples.num_samples(subject.split), limit)
    # As in the run, whose model has positions for the longest sequences of all stages.
    facts = samples.facts if subject.longest is None else replace(samples.facts, sequence_length=subject.longest)
    task = configured_task(config.task, facts, config.seed, loss_chunk_tokens=0)
    model = build_model_on_meta(task, config.model, facts)

    def batches() -> Iterator[Batch]:
        for micro in evaluation_batches(
            samples,
            subject.split,
            micro_size=min(_BATCH_SIZE, num_samples),
            dp_rank=0,
            dp_degree=1,
            max_samples=num_samples,
            spread=True,
        ):
            seed_sample(config.seed, int(micro.positions[0]))
            yield exported_batch(task, micro.samples, micro.positions)

    splits: dict[str, Literal["train", "validation", "test"]] = {name: name for name in ("train", "validation", "test")}
    return Reference(
        task=task,
        task_name=config.task.name,
        model=model,
        held_out=HeldOut("other" if asked.files else splits.get(asked.split, "other"), num_samples, batches),
        source=subject.source,
        monitor=config.evaluation.monitor,
        run=asked.run,
        data_fingerprint=None if asked.files else prepared.fingerprint,
    )
