"""Preparation of all that a run is trained and evaluated on, before it starts: every stage, and every set."""

from collections.abc import Mapping

from sharding.ranks.errors import UserError
from trainer.config import RunConfig
from trainer.config.stages import errors_of_stage, stages_of
from trainer.data.evaluation_sets import prepare_sets
from trainer.data.files import find_files
from trainer.data.prepare import prepare_samples
from trainer.data.prepared import find_prepared
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
            refuse_single_document(stage.config, (fingerprints or {}).get(stage.name))
            data = with_tokenizer_of_first(stage.config.data, found[0].corpus if found else None)
            corpus = prepare_samples(data, progress=progress, fingerprint=(fingerprints or {}).get(stage.name))
            found.append(StageCorpus(stage, corpus, prepare_sets(stage.config, corpus, progress=progress)))
    if config.stages:
        check_stages(found)
    return found


def refuse_single_document(config: RunConfig, fingerprint: str | None = None) -> None:
    """Assert, before it is read, that a corpus of texts can be divided where a part of it is to be evaluated on.

    Args:
        config: the run, or a stage of it.
        fingerprint: of the tokens that it is trained on, see ``find_prepared``.

    Raises:
        UserError: it is one file and so one document, which is held out whole or not at all.
    """
    data, every_steps = config.data, config.evaluation.every_steps
    if not every_steps or data.source != "text" or data.mixture or data.has_rows or data.streaming:
        return
    # What is prepared has been divided, and its source may be gone.
    if find_prepared(data, fingerprint) is None and len(files := find_files(data).files) == 1:
        raise UserError(
            f"evaluation.every_steps={every_steps} evaluates held-out documents, but data.paths names {files[0]} "
            "alone, and a text file is one document, held out whole or not at all; divide it into several files, write "
            "its texts as the rows of a JSONL file (data.source=jsonl), or set evaluation.every_steps=0."
        )
