"""Preparation of all that a run is trained and evaluated on, before it starts: every stage, and every set."""

from collections.abc import Mapping

from trainer.config import RunConfig
from trainer.config.stages import errors_of_stage, stages_of
from trainer.data.evaluation_sets import prepare_sets
from trainer.data.prepare import prepare_samples
from trainer.data.prepared_stages import StageCorpus, check_stages, with_tokenizer_of_first


def prepare_run(
    config: RunConfig, fingerprints: Mapping[str, str] | None = None, *, progress: bool = True
) -> list[StageCorpus]:
    """What is prepared of each stage, or of the run where it has none, made now if need be.

    Args:
        config: the run.
        fingerprints: of the tokens that the run is trained on, by stage, see ``find_prepared``.
        progress: whether this process shows a person how it goes.

    Raises:
        UserError: something cannot be read or prepared, or stages have different tokenizers.
    """
    found: list[StageCorpus] = []
    for stage in stages_of(config):
        with errors_of_stage(stage.name):
            data = with_tokenizer_of_first(stage.config.data, found[0].corpus if found else None)
            corpus = prepare_samples(data, progress=progress, fingerprint=(fingerprints or {}).get(stage.name))
            found.append(StageCorpus(stage, corpus, prepare_sets(stage.config, corpus, progress=progress)))
    if config.stages:
        check_stages(found)
    return found
