"""What is evaluated, and on what: found and prepared before ranks start."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sharding.config import ActivationCheckpointingConfig, CompileConfig, ParallelConfig, Strategy
from sharding.ranks.errors import UserError
from trainer.checkpoint.reader import CheckpointReader, open_checkpoint
from trainer.config import RunConfig, parse_config
from trainer.config.data import MESSAGES_SOURCES, DataConfig
from trainer.config.evaluation_sets import set_data
from trainer.config.sections import EvaluationSet
from trainer.config.stages import config_of_step, widest_config
from trainer.data.any_samples import prepared_samples
from trainer.data.evaluation_sets import prepare_sets
from trainer.data.files import source_of_files
from trainer.data.prepare import prepare_rows_by, prepare_samples
from trainer.data.prepared import Prepared, open_corpus
from trainer.data.prepared_own import PreparedOwn
from trainer.data.prepared_rows import PreparedRows
from trainer.data.rows_manifest import FILE_MAX_PIXEL, RECIPE_NAME, SPLITS, RowRecipe, read_recipe
from trainer.data.tokenizer import TRAINED
from trainer.deploy.allowed_code import AllowedCode
from trainer.deploy.loaded import is_exported_model
from trainer.deploy.quantized_folder import read_description
from trainer.deploy.signature import DEPLOYMENT_NAME, read_deployment
from trainer.deploy.trained_model import check_checkpoint
from trainer.files.storage import CheckpointPath

_NO_CODE = AllowedCode()


@dataclass(frozen=True)
class Asked:
    """What a person asks to be evaluated.

    Attributes:
        run: folder of a run or of an exported model, or the URL that a run's checkpoints lie under.
        step: step of the run's checkpoint; the newest if None.
        averaged: whether to take the moving average of the run's weights.
        split: which of the run's splits; ignored where files are named.
        files: files to evaluate on in place of a split.
        allowed: the Python code that may run for it.
    """

    run: str
    step: int | None = None
    averaged: bool = False
    split: str = "validation"
    files: tuple[str, ...] = ()
    allowed: AllowedCode = _NO_CODE


@dataclass(frozen=True)
class Subject:
    """Weights and samples that ranks can evaluate.

    Attributes:
        config: of the run, or made for the exported model.
        prepared_dir: folder of the prepared samples.
        split: which of them.
        checkpoint: folder of the checkpoint; None where ``config.model.pretrained`` is the exported model.
        step: of the checkpoint; None likewise.
        averaged: whether its moving average is evaluated.
        source: what is evaluated on, in words.
        longest: tokens of the longest sequences of all stages, for which the run's model has positions; None without
            stages.
    """

    config: RunConfig
    prepared_dir: Path
    split: str
    checkpoint: CheckpointPath | None
    step: int | None
    averaged: bool
    source: str
    longest: int | None = None


def find_subject(asked: Asked, num_ranks: int, work: Path) -> Subject:
    """Find weights and samples, and prepare what is not prepared.

    Args:
        asked: what is asked for.
        num_ranks: ranks that will evaluate.
        work: an empty folder that lasts until they are done.

    Raises:
        UserError: there is no such run, checkpoint or split, something is damaged, or code is not allowed.
    """
    if is_exported_model(asked.run):
        return _exported(asked, num_ranks)
    reader = open_checkpoint(asked.run, asked.step)
    config = check_checkpoint(reader, averaged=asked.averaged, allowed=asked.allowed)
    longest = widest_config(config).data.sequence_length if config.stages else None
    config = config_of_step(config, reader.manifest.training.step)
    asked.allowed.check_samples(config, f"checkpoint {reader.folder}")
    if asked.files:
        prepared, data = _prepare_files(asked, config.data, reader.read_recipe(), _tokenizer_of(reader, work))
        config, split = config.model_copy(update={"data": data}), _split_of_files(prepared)
    else:
        prepared = open_corpus(config, reader.manifest.data_fingerprint)
        if prepared.fingerprint != reader.manifest.data_fingerprint:
            raise UserError(
                f"checkpoint {reader.folder} was trained on other data than {prepared.folder}, whose held-out samples "
                "it may have seen; restore the data, or name files by --data."
            )
        split = asked.split
        if (one := _set_of(config, split)) is not None:
            prepared = prepare_sets(one, prepared, progress=False)[split]
            config = config.model_copy(update={"data": set_data(config.data, one.evaluation.sets[0])})
            split = _split_of_files(prepared)
        else:
            _check_split(asked, prepared, config)
    return Subject(
        config=_for_evaluation(config, num_ranks),
        prepared_dir=prepared.folder,
        split=split,
        checkpoint=reader.folder,
        step=reader.manifest.training.step,
        averaged=asked.averaged,
        source=" ".join(asked.files) or f"the {'split' if split == asked.split else 'set'} {asked.split}",
        longest=longest,
    )


def _set_of(config: RunConfig, name: str) -> RunConfig | None:
    """The run with one of its ``evaluation.sets`` alone; None where none has this name."""
    sets = tuple(one for one in config.evaluation.sets if one.name == name)
    return (
        config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"sets": sets})}) if sets else None
    )


def _check_split(asked: Asked, prepared: Prepared, config: RunConfig) -> None:
    """Assert that there is something to evaluate on."""
    names = SPLITS if isinstance(prepared, PreparedRows | PreparedOwn) else ("train", "validation")
    if asked.split in names and prepared_samples(prepared, config.data, verify=False).num_samples(asked.split):
        return
    known = ", ".join([*names, *(one.name for one in config.evaluation.sets)])
    setting = {"test": "data.split.test_fraction or data.test_paths", "validation": "data.validation_fraction"}
    if isinstance(prepared, PreparedOwn) and asked.split in names:
        raise UserError(
            f"--split {asked.split}: {asked.run} has no samples in such a split, since data.factory="
            f"{config.data.factory} makes none; name another one."
        )
    reason = f"set {setting[asked.split]} for the next run" if asked.split in names else f"there are {known}"
    raise UserError(
        f"--split {asked.split}: {asked.run} has no samples in such a split; {reason}, or name files by --data."
    )


def _exported(asked: Asked, num_ranks: int) -> Subject:
    folder = Path(asked.run)
    for option, is_given in (("--ema", asked.averaged), ("--step", asked.step is not None)):
        if is_given:
            raise UserError(f"{option}: {folder} is an exported model, which has one set of weights; name the run.")
    if not asked.files:
        raise UserError(f"{folder} is an exported model, which has no split of its own; name files by --data.")
    description = read_description(folder)
    task, head = _task_of(description.get("architectures") or ["nothing"], folder)
    recipe_file = folder / RECIPE_NAME
    recipe = read_recipe(recipe_file) if recipe_file.exists() else None
    deployment = read_deployment(folder) if (folder / DEPLOYMENT_NAME).exists() else None
    if (recipe is None) != (head in _HEADS_OF_TOKENS):
        raise UserError(
            f"{folder} has a {head} and no {RECIPE_NAME}, which says how rows are read; export the run once more."
        )
    length = min(description.get("max_position_embeddings") or _LONGEST, _LONGEST)
    values: dict[str, Any] = {
        "steps": 1,
        "task": {"name": task} if recipe is None else _task_of_rows(task, recipe, len(description.get("id2label", ()))),
        "model": {"pretrained": str(folder), "trust_remote_code": asked.allowed.trust_remote_code},
        "data": {"source": "python-stdlib", "sequence_length": (recipe and recipe.sequence_length) or length},
    }
    config = parse_config(values, str(folder), has_rules=False)
    data = config.data
    if deployment is not None and deployment.normalize is not None:
        data = data.model_copy(update={"normalize": deployment.normalize})
    prepared, data = _prepare_files(asked, data, recipe, folder)
    return Subject(
        config=_for_evaluation(config.model_copy(update={"data": data}), num_ranks),
        prepared_dir=prepared.folder,
        split=_split_of_files(prepared),
        checkpoint=None,
        step=None,
        averaged=False,
        source=" ".join(asked.files),
    )


_LONGEST = 1024
_HEADS_OF_TOKENS = {"ForCausalLM": "causal-lm", "LMHeadModel": "causal-lm", "ForMaskedLM": "masked-lm"}
_HEADS = {
    **_HEADS_OF_TOKENS,
    "ForSequenceClassification": "sequence-classification",
    "ForTokenClassification": "token-classification",
    "ForImageClassification": "image-classification",
}


def _task_of(architectures: list[str], folder: Path) -> tuple[str, str]:
    """The task that the head of an exported model is for, and the head."""
    for head, task in _HEADS.items():
        if architectures[0].endswith(head):
            return task, head
    raise UserError(f"{folder} holds a {architectures[0]}, none of {', '.join(_HEADS)}; evaluate the run in its place.")


def _task_of_rows(task: str, recipe: RowRecipe, num_outputs: int) -> dict[str, str]:
    """The task of a head for rows, which goes by the name of another one where transformers has none of its own."""
    if recipe.label_kind == "number":
        return {"name": "regression"}
    name = "audio-classification" if recipe.kind == "audio" else task
    return {"name": name, "loss": "binary-cross-entropy" if num_outputs == 1 else "auto"}


def _prepare_files(
    asked: Asked, data: DataConfig, recipe: RowRecipe | None, tokenizer_dir: Path | None
) -> tuple[Prepared, DataConfig]:
    """Samples of files as the run reads its own, and the section ``data`` that they have."""
    if data.source == "factory":
        raise UserError(f"--data: the run's samples are made by data.factory={data.factory}, not read; name a --split.")
    if recipe is None:
        source: Any = source_of_files(asked.files)
    elif recipe.max_pixel != FILE_MAX_PIXEL:
        raise UserError(
            f"--data: the model has learnt scikit-learn's digits, whose pixels go up to {recipe.max_pixel}, and those "
            f"of image files to {FILE_MAX_PIXEL}; evaluate its run on one of the run's splits by --split."
        )
    else:
        kinds = {"table": "table", "image": "images", "audio": "audio"}
        source = kinds.get(recipe.kind) or source_of_files(asked.files)
    if data.has_messages and not data.mixture and source not in MESSAGES_SOURCES:
        raise UserError(f"--data: the run is trained on conversations, which no files of {source} hold; give jsonl.")
    given = EvaluationSet(
        name="data",
        source=source,
        paths=asked.files,
        text_field=data.text_field,
        messages_field=data.messages_field,
    )
    data = set_data(data, given).model_copy(
        update={
            "streaming": False,
            # A recipe's is used, since that of this name may be gone.
            "tokenizer": TRAINED if recipe is not None else str(tokenizer_dir),
            "vocab_size": DataConfig.model_fields["vocab_size"].default,
            # The tokenizer has the one that was trained on.
            "chat_template": None,
        }
    )
    if recipe is None:
        return prepare_samples(data, progress=False), data
    of_rows: dict[str, Any] = {
        "format": "rows",
        "label_kind": recipe.label_kind,
        # What is not there is the training rows' mean, or an error: no row is left out of a score.
        "missing": "mean" if (recipe.missing or data.missing) == "mean" else "error",
        "normalize": recipe.normalize or data.normalize,
    }
    if recipe.image_shape is not None:
        of_rows |= {"image_channels": recipe.image_shape[0], "image_size": recipe.image_shape[1]}
    data = data.model_copy(update=of_rows)
    return prepare_rows_by(recipe, data, tokenizer_dir, progress=False), data


def _split_of_files(prepared: Prepared) -> str:
    return "test" if isinstance(prepared, PreparedRows) else "train"


def _tokenizer_of(reader: CheckpointReader, work: Path) -> Path | None:
    folder = work / "tokenizer"
    folder.mkdir()
    return folder if reader.unpack_tokenizer(folder) else None


def _for_evaluation(config: RunConfig, num_ranks: int) -> RunConfig:
    """The run without what makes training fast: weights as they were trained are sharded, where they were, or whole."""
    is_sharded = config.parallel.strategy in ("zero3", "hsdp")
    strategy: Strategy = "none" if num_ranks == 1 else "zero3" if is_sharded else "ddp"
    return config.model_copy(
        update={
            "parallel": ParallelConfig(strategy=strategy),
            "compile": CompileConfig(),
            "activation_checkpointing": ActivationCheckpointingConfig(),
        }
    )
