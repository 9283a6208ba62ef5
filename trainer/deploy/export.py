"""A checkpoint as a folder that `transformers` loads."""

import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from sharding.ranks.errors import UserError
from trainer.checkpoint.reader import CheckpointReader
from trainer.config import RunConfig, parse_config
from trainer.config.stages import stages_of, widest_config
from trainer.data.chat_template import end_of_turn_ids
from trainer.data.facts import SampleFacts
from trainer.data.prepared import Prepared, open_corpus
from trainer.data.prepared_own import PreparedOwn
from trainer.data.prepared_rows import recipe_facts
from trainer.data.rows_manifest import RECIPE_NAME
from trainer.data.tokenizer import load_tokenizer
from trainer.deploy.adapters import ModelWeights, merged_weights, refuse_form, write_adapters
from trainer.deploy.allowed_code import AllowedCode
from trainer.files.atomic_files import umask
from trainer.model.models import build_model_on_meta
from trainer.model.pretrained import stored_by_name, tied_names
from trainer.model.stored_tensor import StoredTensor
from trainer.tasks.registry import configured_task

_MAX_FILE_BYTES = 4 * 2**30
_NO_CODE = AllowedCode()


Form = Literal["adapter", "merged"]
"""Of a run with adapters: these alone, or the model that they make of the weights beside them."""


def export_model(
    reader: CheckpointReader,
    folder: Path,
    *,
    averaged: bool = False,
    allowed: AllowedCode = _NO_CODE,
    form: Form | None = None,
) -> None:
    """Write the model of a checkpoint, its configuration and tokenizer, so that `from_pretrained` loads them.

    Tensors pass through memory one file at a time. The folder appears complete or not at all, and only where what
    `from_pretrained` makes of it is the model that was trained.

    Args:
        reader: the checkpoint.
        folder: where to; must be new or empty.
        averaged: whether to take the moving average of the weights instead of the weights.
        allowed: the Python code that may run for it.
        form: of a run with adapters, which of both; None elsewhere.

    Raises:
        UserError: the folder has contents or cannot be written, the checkpoint has no average or is corrupt, it is an
            old one without a tokenizer and the run's corpus is gone, it asks for code that is not allowed, the form is
            not one that it has, or `transformers` would make another model of it.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--to {folder} is {'not empty' if folder.is_dir() else 'a file'}; name a new folder.")
    if averaged and not reader.has_average:
        raise UserError(
            f"--ema: checkpoint {reader.folder} has no average of the weights; leave out --ema, or train with "
            "optimizer.ema_decay above 0, such as 0.999."
        )
    reader.verify()
    config = parse_config(reader.manifest.config, source=f"{reader.folder}", has_rules=False)
    refuse_form(reader, config, form)
    # Of stages, the last conversations say how an answer ends.
    has_messages = any(stage.config.data.has_messages for stage in stages_of(config))
    config = widest_config(config)
    allowed.check(config, f"checkpoint {reader.folder}")
    recipe = reader.read_recipe()
    is_own = config.data.source == "factory"
    corpus = _corpus_of(reader, config) if recipe is None and (is_own or not reader.manifest.tokenizer) else None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    except OSError as error:
        raise _not_writable(folder, error) from None
    try:
        if corpus is not None and corpus.tokenizer_dir is not None:
            shutil.copytree(corpus.tokenizer_dir, work, dirs_exist_ok=True)
        has_tokenizer = reader.unpack_tokenizer(work)
        if recipe is not None:
            facts = recipe_facts(recipe, work if has_tokenizer else None)
            # Whoever feeds the model must know how rows were normalised, and what its outputs are.
            (work / RECIPE_NAME).write_text(recipe.model_dump_json(indent=1) + "\n")
        elif isinstance(corpus, PreparedOwn):
            facts = replace(corpus.facts(), tokenizer_dir=work if corpus.tokenizer_dir is not None else None)
        else:
            tokens = corpus or reader.manifest.tokenizer
            assert tokens is not None, "there is a tokenizer or a corpus"
            facts = SampleFacts(config.data.sequence_length, tokens.vocab_size, tokens.eos_token_id, work)
            if config.data.mask_token:
                tokenizer = load_tokenizer(str(work), masks=True)
                facts = replace(facts, pad_token_id=tokenizer.pad_token_id, mask_token_id=tokenizer.mask_token_id)
        model = _build_model(config, facts)
        if form == "adapter":
            write_adapters(reader, model, config, work, averaged=averaged)
        else:
            weights = merged_weights(reader, model, config)
            ends = end_of_turn_ids(work) if has_messages else set()
            _write_configuration(model, facts.vocab_size, ends, work)
            check_reloads(model, weights, work, trust_remote_code=config.model.trust_remote_code)
            _write_weights(weights, work, averaged=averaged)
        # mkdtemp made the folder private, and safetensors its files.
        for path in work.rglob("*"):
            path.chmod((0o777 if path.is_dir() else 0o666) & ~umask())
        work.chmod(0o777 & ~umask())
        if folder.exists():
            folder.rmdir()
        work.rename(folder)
    except BaseException as error:
        shutil.rmtree(work, ignore_errors=True)
        if isinstance(error, OSError | SafetensorError):
            raise _not_writable(folder, error) from None
        raise


def _corpus_of(reader: CheckpointReader, config: RunConfig) -> Prepared:
    """The corpus of a checkpoint that was written without its tokenizer."""
    corpus = open_corpus(config, reader.manifest.data_fingerprint)
    if corpus.fingerprint != reader.manifest.data_fingerprint:
        raise UserError(
            f"checkpoint {reader.folder} was trained on another corpus than {corpus.folder}, whose tokenizer may "
            "differ; restore the corpus, or use the Python version of the run if data.source is python-stdlib."
        )
    return corpus


def _not_writable(folder: Path, error: Exception) -> UserError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return UserError(f"--to {folder} cannot be written: {reason}; name another folder, or free some space.")


def _build_model(config: RunConfig, facts: SampleFacts) -> Any:
    """The run's model, without memory."""
    from transformers import PreTrainedModel

    task = configured_task(config.task, facts, loss_chunk_tokens=0)
    model = build_model_on_meta(task, config.model, facts)
    if not isinstance(model, PreTrainedModel):
        raise UserError(
            f"task.name={config.task.name} trains {_class_of(model)}, which is no model of transformers, so that "
            "nothing could load an export of it; trainer.checkpoint.reader.CheckpointReader reads its weights."
        )
    return model


def _write_configuration(model: Any, vocab_size: int | None, ends: set[int], work: Path) -> None:
    """Write the model's configuration, and how to generate with it: also up to one of the ends of an answer."""
    from transformers.dynamic_module_utils import custom_object_save

    model.config.architectures = [type(model).__name__]
    model.config.dtype = torch.float32
    if model._auto_class is not None:
        # A class of the model's own code goes along, and its configuration's code with the configuration.
        custom_object_save(model, work, config=model.config)
    model.config.save_pretrained(work)
    if vocab_size is not None and getattr(model, "generation_config", None) is not None:
        # Ids that pad the vocabulary stand for nothing: whoever generates with the model must not draw them.
        padding = range(vocab_size, model.config.get_text_config().vocab_size)
        suppressed = {*(model.generation_config.suppress_tokens or ()), *padding}
        model.generation_config.suppress_tokens = sorted(suppressed) or None
        if ends:
            model.generation_config.eos_token_id = sorted(ends)
        model.generation_config.save_pretrained(work)


def check_reloads(model: Any, reader: ModelWeights, folder: Path, *, trust_remote_code: bool) -> None:
    """Refuse an export that `from_pretrained` would make another model of; reads no weights.

    Args:
        model: the model that was trained, without memory.
        reader: its weights, whose names the export will have.
        folder: where its configuration was written to.
        trust_remote_code: whether a model's own code may run.

    Raises:
        UserError: the class is not one that transformers has, or it would load some weights as others, or not at all.
    """
    import transformers

    def refused(reason: str) -> UserError:
        return UserError(
            f"checkpoint {reader.folder} cannot be exported as a model of transformers: {reason}; "
            "trainer.checkpoint.reader.CheckpointReader reads its weights."
        )

    kind = type(model)
    if model._auto_class is None and getattr(transformers, kind.__name__, None) is not kind:
        raise refused(f"{_class_of(model)} is no class of its own")
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        loaded = kind(config)
    expected = {name: tuple(tensor.shape) for name, tensor in loaded.state_dict().items()}
    stored = {
        name: StoredTensor(shape, torch.float32, lambda _: torch.empty(0))
        for name, shape in reader.parameter_shapes().items()
    }
    try:
        found = stored_by_name(loaded, stored)
    except ValueError as error:
        raise refused(f"its weights {error}") from None
    for name, tensor in stored.items():
        if found.get(name) is not tensor:
            raise refused(f"{kind.__name__} has another use for {name}, or none")
        if expected[name] != tuple(tensor.shape):
            raise refused(f"{name} has shape {list(tensor.shape)}, and {kind.__name__} makes it {list(expected[name])}")
    tied = tied_names(loaded)
    for name in expected:
        if not any(other in found for other in tied.get(name, [name])):
            raise refused(f"it has no {name}, which {kind.__name__} needs")


def _class_of(model: Any) -> str:
    return f"{type(model).__module__}.{type(model).__name__}"


def _write_weights(reader: ModelWeights, work: Path, *, averaged: bool) -> None:
    """Shared tensors are in the checkpoint once, under the name that `transformers` ties the others to."""

    def read(names: list[str]) -> dict[str, torch.Tensor]:
        return {name: reader.read_parameter(name, averaged=averaged) for name in names}

    groups: list[list[str]] = [[]]
    num_bytes = 0
    for name in reader.parameter_names():
        size = reader.parameter_bytes(name)
        if groups[-1] and num_bytes + size > _MAX_FILE_BYTES:
            groups.append([])
            num_bytes = 0
        groups[-1].append(name)
        num_bytes += size
    if len(groups) == 1:
        save_file(read(groups[0]), work / "model.safetensors", {"format": "pt"})
        return
    files: dict[str, str] = {}
    for index, names in enumerate(groups, start=1):
        file = f"model-{index:05d}-of-{len(groups):05d}.safetensors"
        save_file(read(names), work / file, {"format": "pt"})
        files |= dict.fromkeys(names, file)
    total = sum(reader.parameter_bytes(name) for name in files)
    index_text = json.dumps({"metadata": {"total_size": total}, "weight_map": files}, indent=2)
    (work / "model.safetensors.index.json").write_text(index_text + "\n")
