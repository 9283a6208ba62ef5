"""The model of a checkpoint, and what is known of it without the run's data."""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sharding.ranks.errors import UserError
from trainer.checkpoint.reader import CheckpointReader
from trainer.config import RunConfig, parse_config
from trainer.config.stages import stages_of, widest_config
from trainer.data.chat_template import end_of_turn_ids
from trainer.data.facts import SampleFacts
from trainer.data.prepared import Prepared, open_corpus
from trainer.data.prepared_own import PreparedOwn
from trainer.data.prepared_rows import recipe_facts
from trainer.data.rows_manifest import RECIPE_NAME, RowRecipe
from trainer.data.tokenizer import load_tokenizer
from trainer.deploy.adapters import MergedWeights, ModelWeights, merged_weights
from trainer.deploy.allowed_code import AllowedCode
from trainer.model.models import build_model_on_meta
from trainer.tasks.registry import configured_task
from trainer.tasks.task import Task

# Neither runs on every machine that an export is made on.
_ATTENTION_OF_GPUS = ("flex_attention", "flash_attention_2")


@dataclass(frozen=True)
class TrainedModel:
    """A checkpoint's model, whose weights are read when they are asked for.

    Attributes:
        reader: the checkpoint.
        run_config: the run's configuration.
        config: the same of the stage with the longest sequences.
        facts: what is known of the samples.
        task: the run's.
        model: the model without adapters and without memory.
        weights: of that model.
        averaged: whether their moving average is meant.
        recipe: how rows are read; None where samples are packed tokens or the user's own.
        ends: tokens that end an answer, of a run on conversations.
    """

    reader: CheckpointReader
    run_config: RunConfig
    config: RunConfig
    facts: SampleFacts
    task: Task
    model: Any
    weights: ModelWeights
    averaged: bool
    recipe: RowRecipe | None
    ends: set[int]

    def materialized(self) -> nn.Module:
        """The model with its weights, fp32 on the host, in evaluation mode.

        Raises:
            UserError: the checkpoint lacks a tensor of the model's, or has one that it has no place for.
        """
        settings = self.config.model
        if settings.attention in _ATTENTION_OF_GPUS:
            settings = settings.model_copy(update={"attention": "sdpa"})
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            model = self.task.build_model(settings, self.facts)
        self._load_into(model)
        return model.eval().requires_grad_(False)

    @property
    def has_adapters(self) -> bool:
        """Whether training had adapters beside the weights, which are merged here."""
        return isinstance(self.weights, MergedWeights)

    def as_trained(self) -> nn.Module:
        """The model as training ran it, adapters beside the weights and not in them; else as ``materialized``.

        It is for comparison alone: what is added is no part of its class.
        """
        model = self.materialized()
        if isinstance(self.weights, MergedWeights):
            self.weights.take_apart(model, averaged=self.averaged)
        return model

    def _load_into(self, model: nn.Module) -> None:
        state, names = model.state_dict(), self.weights.parameter_names()
        try:
            for name in names:
                state[name].copy_(self.weights.read_parameter(name, averaged=self.averaged))
        except (KeyError, RuntimeError) as error:
            raise UserError(
                f"checkpoint {self.reader.folder} is of another model than {class_of(model)}, which task.name="
                f"{self.config.task.name} builds now ({error}); restore the code that it was trained with."
            ) from None
        # Shared tensors are in the checkpoint once.
        filled = {state[name].data_ptr() for name in names}
        lacking = [name for name, tensor in state.items() if tensor.numel() and tensor.data_ptr() not in filled]
        if lacking:
            raise UserError(
                f"checkpoint {self.reader.folder} has no {lacking[0]}, which {class_of(model)} needs; restore the code "
                "that it was trained with."
            )


def check_checkpoint(reader: CheckpointReader, *, averaged: bool, allowed: AllowedCode) -> RunConfig:
    """Assert that a checkpoint is whole and may be used.

    Args:
        reader: the checkpoint.
        averaged: whether the moving average of the weights is meant.
        allowed: the Python code that may run for it.

    Returns:
        The run's configuration.

    Raises:
        UserError: the checkpoint has no average or is corrupt, or it asks for code that is not allowed.
    """
    if averaged and not reader.has_average:
        raise UserError(
            f"--ema: checkpoint {reader.folder} has no average of the weights; leave out --ema, or train with "
            "optimizer.ema_decay above 0, such as 0.999."
        )
    reader.verify()
    config = parse_config(reader.manifest.config, source=f"{reader.folder}", has_rules=False)
    allowed.check(widest_config(config), f"checkpoint {reader.folder}")
    return config


def open_trained(reader: CheckpointReader, config: RunConfig, work: Path, *, averaged: bool) -> TrainedModel:
    """Build a checkpoint's model without memory.

    Args:
        reader: the checkpoint.
        config: the run's, see ``check_checkpoint``.
        work: a folder that gets the tokenizer and how rows are read, which go into an export.
        averaged: whether the moving average of the weights is meant.

    Raises:
        UserError: it is an old checkpoint without a tokenizer and the run's corpus is gone.
    """
    # Of stages, the last conversations say how an answer ends.
    has_messages = any(stage.config.data.has_messages for stage in stages_of(config))
    run_config, config = config, widest_config(config)
    recipe = reader.read_recipe()
    facts = _facts_of(reader, config, recipe, work)
    task = configured_task(config.task, facts, config.seed, loss_chunk_tokens=0)
    model = build_model_on_meta(task, config.model, facts)
    if recipe is not None:
        _write_recipe(recipe, config, model, work)
    return TrainedModel(
        reader=reader,
        run_config=run_config,
        config=config,
        facts=facts,
        task=task,
        model=model,
        weights=merged_weights(reader, model, config),
        averaged=averaged,
        recipe=recipe,
        ends=end_of_turn_ids(work) if has_messages else set(),
    )


def _write_recipe(recipe: RowRecipe, config: RunConfig, model: Any, work: Path) -> None:
    """Write how rows are read, for whoever feeds the model, with what otherwise the configuration alone says."""
    read_as: dict[str, Any] = {"normalize": config.data.normalize, "missing": config.data.missing}
    settings: Any = getattr(model, "config", None)
    has_config = settings is not None and hasattr(settings, "get_text_config")
    padding = getattr(settings.get_text_config(), "pad_token_id", None) if has_config else None
    if recipe.kind == "text" and padding is not None and padding >= 0:
        # A decoder finds the end of a text by its own, whatever the tokenizer fills up with.
        read_as["pad_token_id"] = padding
    (work / RECIPE_NAME).write_text(recipe.model_copy(update=read_as).model_dump_json(indent=1) + "\n")


def _facts_of(reader: CheckpointReader, config: RunConfig, recipe: RowRecipe | None, work: Path) -> SampleFacts:
    is_own = config.data.source == "factory"
    corpus = _corpus_of(reader, config) if recipe is None and (is_own or not reader.manifest.tokenizer) else None
    if corpus is not None and corpus.tokenizer_dir is not None:
        shutil.copytree(corpus.tokenizer_dir, work, dirs_exist_ok=True)
    has_tokenizer = reader.unpack_tokenizer(work)
    if recipe is not None:
        return recipe_facts(recipe, work if has_tokenizer else None)
    if isinstance(corpus, PreparedOwn):
        return replace(corpus.facts(), tokenizer_dir=work if corpus.tokenizer_dir is not None else None)
    tokens = corpus or reader.manifest.tokenizer
    assert tokens is not None, "there is a tokenizer or a corpus"
    facts = SampleFacts(config.data.sequence_length, tokens.vocab_size, tokens.eos_token_id, work)
    if config.data.mask_token:
        tokenizer = load_tokenizer(str(work), masks=True)
        facts = replace(facts, pad_token_id=tokenizer.pad_token_id, mask_token_id=tokenizer.mask_token_id)
    return facts


def _corpus_of(reader: CheckpointReader, config: RunConfig) -> Prepared:
    """The corpus of a checkpoint that was written without its tokenizer."""
    corpus = open_corpus(config, reader.manifest.data_fingerprint)
    if corpus.fingerprint != reader.manifest.data_fingerprint:
        raise UserError(
            f"checkpoint {reader.folder} was trained on another corpus than {corpus.folder}, whose tokenizer may "
            "differ; restore the corpus, or use the Python version of the run if data.source is python-stdlib."
        )
    return corpus


def class_of(model: object) -> str:
    """Name of a model's class, with its module."""
    return f"{type(model).__module__}.{type(model).__name__}"
