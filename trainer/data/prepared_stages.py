"""What is prepared of each stage of a run, found without loading any heavy library."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from sharding.ranks.errors import UserError
from trainer.config import RunConfig
from trainer.config.data import DataConfig
from trainer.config.stages import Stage, errors_of_stage, stage_of_step, stages_of
from trainer.data.prepared import Prepared, find_prepared, open_corpus


@dataclass(frozen=True)
class StageCorpus:
    """What a stage is trained and evaluated on; a run without stages has one.

    Attributes:
        stage: the stage.
        corpus: what is prepared of its data.
        sets: what is prepared of ``evaluation.sets``, by name.
    """

    stage: Stage
    corpus: Prepared
    sets: Mapping[str, Prepared] = field(default_factory=dict)


def whole_run(config: RunConfig, corpus: Prepared, sets: Mapping[str, Prepared] | None = None) -> list[StageCorpus]:
    """What a run without stages is trained and evaluated on, as the one stage that it is."""
    (stage,) = stages_of(config)
    return [StageCorpus(stage, corpus, sets or {})]


def find_stages(config: RunConfig, fingerprints: Mapping[str, str]) -> list[Prepared] | None:
    """What is prepared of every stage, or of the run where it has none; None where something is still to be prepared.

    Args:
        config: the run.
        fingerprints: of the tokens that a run is trained on, by stage, see ``find_prepared``.

    Raises:
        UserError: see ``find_prepared``.
    """
    found: list[Prepared] = []
    for stage in stages_of(config):
        with errors_of_stage(stage.name):
            data = with_tokenizer_of_first(stage.config.data, found[0] if found else None)
            prepared = find_prepared(data, fingerprints.get(stage.name))
        if prepared is None:
            return None
        found.append(prepared)
    return found


def open_stage(config: RunConfig, fingerprints: Mapping[str, str], step: int) -> Prepared:
    """What was prepared for the stage that a step belongs to, or of the run where it has none.

    Args:
        config: the run.
        fingerprints: see ``find_stages``.
        step: counted from 1.

    Raises:
        UserError: it is no longer there.
    """
    stages = stages_of(config)
    stage = stage_of_step(stages, step)
    known = fingerprints.get(stage.name)
    if known is None and stage.index:
        # Its tokenizer may have been trained on the first stage's corpus.
        found = find_stages(config, fingerprints)
        if found is not None:
            return found[stage.index]
    return open_corpus(stage.config, known)


def with_tokenizer_of_first(data: DataConfig, first: Prepared | None) -> DataConfig:
    """The section ``data`` of a later stage with the tokenizer of the first, which may have been trained on its corpus.

    Args:
        data: the stage's.
        first: what is prepared of the first stage; None for that itself.
    """
    if first is None or first.tokenizer_dir is None:
        return data
    # The size that was asked for is of a tokenizer that is trained.
    unused = DataConfig.model_fields["vocab_size"].default
    return data.model_copy(update={"tokenizer": str(first.tokenizer_dir), "vocab_size": unused})


def check_stages(corpora: list[StageCorpus]) -> None:
    """Assert that each stage has samples, and that all have one tokenizer.

    Raises:
        UserError: one is too small for its sequence length, or was prepared with another tokenizer.
    """
    first = corpora[0]
    for one in corpora:
        with errors_of_stage(one.stage.name):
            one.corpus.check_sequence_length(one.stage.config.data.sequence_length)
            if one.stage.index and _tokenizer(one.corpus) != _tokenizer(first.corpus):
                raise UserError(
                    f"its corpus {one.corpus.folder} was prepared with another tokenizer than that of stage "
                    f"{first.stage.name}, {first.corpus.folder}, but a run has one for all stages; name it as "
                    "data.tokenizer."
                )


def _tokenizer(prepared: Prepared) -> str | None:
    """SHA-256 of a corpus's tokenizer."""
    corpora = getattr(prepared, "corpora", None)
    return None if corpora is None else str(corpora[0].manifest.tokenizer_sha256)
