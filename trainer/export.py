"""``shardline export``: a checkpoint as a folder that `transformers` loads.

``python -m trainer.export RUN --to DIR [--step N] [--ema]``
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from sharding.errors import EXIT_FINISHED, UserError, ends_with_a_sentence
from trainer.atomic_files import umask
from trainer.checkpoint.reader import CheckpointReader
from trainer.config import RunConfig, parse_config
from trainer.data.prepared import Prepared
from trainer.models import Vocabulary, build_model_config, build_model_on_meta
from trainer.run_arguments import open_checkpoint, open_corpus
from trainer.tasks.registry import build_task

_MAX_FILE_BYTES = 4 * 2**30


def export_model(reader: CheckpointReader, folder: Path, *, averaged: bool = False) -> None:
    """Write the model of a checkpoint, its configuration and tokenizer, so that `from_pretrained` loads them.

    Tensors pass through memory one file at a time. The folder appears whole or not at all.

    Args:
        reader: the checkpoint.
        folder: where to; must be new or empty.
        averaged: whether to take the moving average of the weights instead of the weights.

    Raises:
        UserError: the folder has contents or cannot be written, the checkpoint has no average or is damaged, or it is
            an old one without a tokenizer and the run's corpus is gone.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--to {folder} is {'not empty' if folder.is_dir() else 'a file'}; name a new folder.")
    if averaged and not reader.has_average:
        raise UserError(
            f"--ema: checkpoint {reader.folder} has no average of the weights; leave out --ema, or train with "
            "optimizer.ema_decay above 0, such as 0.999."
        )
    reader.verify()
    config = parse_config(reader.manifest.config, source=f"{reader.folder}")
    corpus = None if reader.manifest.tokenizer else _corpus_of(reader, config)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    except OSError as error:
        raise _not_writable(folder, error) from None
    try:
        if corpus is not None:
            shutil.copytree(corpus.tokenizer_dir, work, dirs_exist_ok=True)
        reader.unpack_tokenizer(work)
        facts = corpus or reader.manifest.tokenizer
        assert facts is not None, "there is a tokenizer or a corpus"
        _write_configuration(config, Vocabulary(facts.vocab_size, facts.eos_token_id), work)
        _write_weights(reader, work, averaged=averaged)
        # mkdtemp made it private.
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


def _write_configuration(config: RunConfig, vocabulary: Vocabulary, work: Path) -> None:
    model_config = build_model_config(config.model, vocabulary, config.data.sequence_length)
    model: Any = build_model_on_meta(build_task(config.task.name, folder=config.task.folder), model_config)
    model_config.architectures = [type(model).__name__]
    model_config.dtype = torch.float32
    model_config.save_pretrained(work)
    if getattr(model, "generation_config", None) is not None:
        # Ids that pad the vocabulary stand for nothing: whoever generates with the model must not draw them.
        padding = range(vocabulary.size, model_config.get_text_config().vocab_size)
        suppressed = {*(model.generation_config.suppress_tokens or ()), *padding}
        model.generation_config.suppress_tokens = sorted(suppressed) or None
        model.generation_config.save_pretrained(work)


def _write_weights(reader: CheckpointReader, work: Path, *, averaged: bool) -> None:
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


@ends_with_a_sentence
def main(arguments: Sequence[str]) -> int:
    """Export a run; returns the exit status."""
    parser = argparse.ArgumentParser(prog="shardline export")
    parser.add_argument("run")
    parser.add_argument("--to", required=True, type=Path)
    parser.add_argument("--step", type=int)
    parser.add_argument("--ema", action="store_true")
    options = parser.parse_args(arguments)
    reader = open_checkpoint(options.run, options.step)
    export_model(reader, options.to, averaged=options.ema)
    average = "the averaged weights of " if options.ema else ""
    print(f"exported {average}step {reader.manifest.training.step} of {options.run} to {options.to}")
    return EXIT_FINISHED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
