"""The data of ``evaluation.sets``, prepared as the run's own was."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from sharding.parallel_dims import Role
from sharding.ranks.errors import UserError
from trainer.config import RunConfig
from trainer.config.data import DataConfig
from trainer.config.evaluation_sets import set_data
from trainer.data.any_samples import prepared_samples
from trainer.data.contents_keys import KEY_BYTES, shared_keys
from trainer.data.loader import evaluation_batches
from trainer.data.prepare import prepare_rows_by, prepare_samples
from trainer.data.prepared import Prepared, PreparedCorpus, PreparedMixture, PreparedTokens
from trainer.data.prepared_rows import PreparedRows
from trainer.data.samples import MicroBatch, Samples


def prepare_sets(config: RunConfig, prepared: Prepared, *, progress: bool = True) -> dict[str, Prepared]:
    """What is prepared of each set, by its name, made now if need be.

    Texts are tokenised as those that are trained on, and rows are read by their recipe.

    Args:
        config: the run.
        prepared: what it is trained on.
        progress: whether this process shows a person how it goes.

    Raises:
        UserError: a set cannot be read, or is not of the kind that is trained on.
    """
    sets: dict[str, Prepared] = {}
    for one in config.evaluation.sets:
        data = set_data(config.data, one)
        try:
            if isinstance(prepared, PreparedRows):
                sets[one.name] = prepare_rows_by(
                    prepared.recipe, data, prepared.tokenizer_dir, trained=prepared, progress=progress
                )
            else:
                # The size that was asked for is of a tokenizer that is trained.
                unused: dict[str, Any] = {"vocab_size": DataConfig.model_fields["vocab_size"].default}
                # The tokenizer has the chat template that is trained on.
                unused["chat_template"] = None
                data = data.model_copy(update={"tokenizer": str(prepared.tokenizer_dir)} | unused)
                sets[one.name] = prepare_samples(data, progress=progress)
        except UserError as error:
            raise UserError(f"evaluation.sets {one.name}: {error}") from None
    return sets


def describe_trained(sets: Mapping[str, Prepared], prepared: Prepared) -> list[str]:
    """For each set of packed tokens a sentence, if documents of it are trained on as well; of rows these are dropped.

    Args:
        sets: see ``prepare_sets``.
        prepared: what is trained on.

    Raises:
        UserError: what is known of the documents has changed.
    """
    if not isinstance(prepared, PreparedTokens):
        return []
    # Corpora of an earlier release say nothing of them.
    trained = b"".join(keys for part in prepared.corpora if (keys := part.trained_keys()) is not None)
    sentences = []
    for name, of_set in sets.items():
        keys = of_set.trained_keys() if isinstance(of_set, PreparedCorpus) else None
        if keys and (num_shared := len(shared_keys(keys, trained))):
            sentences.append(
                f"evaluation.sets {name}: {num_shared:,} of its {len(keys) // KEY_BYTES:,} documents are among those "
                "that are trained on, so that its metrics are better than those of new documents; remove them from it"
            )
    return sentences


def set_batches(
    config: RunConfig, prepared: Prepared, sets: Mapping[str, Prepared], role: Role
) -> dict[str, Callable[[], Iterator[MicroBatch]]]:
    """By name what gives this rank's share of each set, and of each source of a mixture where these are evaluated.

    Args:
        config: the run.
        prepared: what it is trained on.
        sets: see ``prepare_sets``.
        role: this rank's among those that read different data.
    """
    verify = config.faults.verify_data
    found: dict[str, tuple[Samples, str]] = {}
    if config.evaluation.by_source and isinstance(prepared, PreparedMixture):
        for corpus in prepared.corpora:
            found[corpus.name] = (prepared_samples(corpus, config.data, verify=verify), "validation")
    for name, of_set in sets.items():
        split = "test" if isinstance(of_set, PreparedRows) else "train"
        found[name] = (prepared_samples(of_set, config.data, verify=verify), split)
    return {
        name: partial(
            evaluation_batches,
            samples,
            split,
            micro_size=config.batch.micro_size,
            dp_rank=role.rank,
            dp_degree=role.degree,
            max_samples=config.evaluation.max_sequences,
            spread=config.data.has_rows,
        )
        for name, (samples, split) in found.items()
        if samples.num_samples(split)
    }
