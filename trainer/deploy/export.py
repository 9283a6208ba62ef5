"""A checkpoint as an exported folder: written, run in its own runtime, compared with the trained model, described."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
from torch import nn

from sharding.ranks.errors import UserError
from trainer.architectures.config import max_positions
from trainer.checkpoint.reader import CheckpointReader
from trainer.data.rows_manifest import TextForm
from trainer.deploy.adapters import refuse_form, write_adapters
from trainer.deploy.allowed_code import AllowedCode
from trainer.deploy.export_program import call_specs, export_program, max_program_length, program_specs, save_program
from trainer.deploy.exported_model import open_exported
from trainer.deploy.held_out import find_held_out
from trainer.deploy.hf_folder import refuse_other_models, write_hf_folder
from trainer.deploy.model_call import ModelCall, record_call
from trainer.deploy.model_card import CARD_NAME, trained_revision, write_card
from trainer.deploy.new_folder import new_folder, refuse_contents
from trainer.deploy.onnx_file import refuse_missing_onnx, write_onnx
from trainer.deploy.signature import (
    FILES,
    Deployment,
    Dtype,
    Format,
    OutputKind,
    RunRecord,
    TensorSpec,
    write_deployment,
)
from trainer.deploy.sparse_folder import SPARSE_ENDING, SPARSE_NOTE, make_sparse
from trainer.deploy.trained_model import TrainedModel, check_checkpoint, open_trained
from trainer.deploy.verify_export import compare, quality, refuse_loss
from trainer.run_folder.provenance import package_version
from trainer.tasks.causal_lm import CausalLanguageModelling
from trainer.tasks.classification import Classification, TokenClassification
from trainer.tasks.masked_lm import MaskedLanguageModelling
from trainer.tasks.regression import Regression
from trainer.tasks.task import Task

_NO_CODE = AllowedCode()

Form = Literal["adapter", "merged"]
"""Of a run with adapters: these alone, or the model that they make of the weights beside them."""


@dataclass(frozen=True)
class ExportOptions:
    """How a checkpoint is exported.

    Attributes:
        format: what is written.
        dtype: format of the weights.
        averaged: take the moving average of the weights instead of the weights.
        allowed: the Python code that may run for it.
        form: of a run with adapters, which of both; None elsewhere.
        accept_loss: write also what is not, or cannot be shown to be, as good as what was trained.
        sparse: store weights with many zeros as a bit for each and the values that are not zero.
    """

    format: Format = "hf"
    dtype: Dtype = "fp32"
    averaged: bool = False
    allowed: AllowedCode = _NO_CODE
    form: Form | None = None
    accept_loss: bool = False
    sparse: bool = False


def export_run(reader: CheckpointReader, folder: Path, options: ExportOptions) -> Deployment | None:
    """Export a checkpoint, and see that what was written computes what was trained.

    The folder appears complete or not at all.

    Args:
        reader: the checkpoint.
        folder: where to; must be new or empty.
        options: how.

    Returns:
        What was written; None of adapters alone, which are no model.

    Raises:
        UserError: the folder has contents or cannot be written, the checkpoint is not one that can be exported so (see
            ``check_checkpoint``, ``write_hf_folder`` and ``export_program``), a package is missing, or the exported
            model is another one than was trained.
    """
    if options.form == "adapter":
        _refuse_formats_of_adapters(options)
        _refuse_sparse(options, "--adapter")
        export_model(reader, folder, averaged=options.averaged, allowed=options.allowed, form=options.form)
        return None
    if options.format != "hf":
        _refuse_sparse(options, f"--format {options.format}")
    if options.format == "onnx":
        refuse_missing_onnx()
    refuse_contents(folder)
    config = check_checkpoint(reader, averaged=options.averaged, allowed=options.allowed)
    refuse_form(reader, config, options.form)
    with new_folder(folder) as work:
        trained = open_trained(reader, config, work, averaged=options.averaged)
        deployment = _write_compared(trained, work, options)
        if options.sparse:
            make_sparse(work)
            with (work / CARD_NAME).open("a") as card:
                card.write(SPARSE_NOTE)
            deployment = deployment.model_copy(update={"file": f"model{SPARSE_ENDING}"})
            write_deployment(deployment, work)
        return deployment


def export_model(
    reader: CheckpointReader,
    folder: Path,
    *,
    averaged: bool = False,
    allowed: AllowedCode = _NO_CODE,
    form: Form | None = None,
) -> None:
    """Write the model of a checkpoint, its configuration and tokenizer, so that `from_pretrained` loads them.

    Nothing is run. Tensors pass through memory one file at a time. The folder appears complete or not at all, and only
    where what `from_pretrained` makes of it is the model that was trained.

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
    refuse_contents(folder)
    config = check_checkpoint(reader, averaged=averaged, allowed=allowed)
    refuse_form(reader, config, form)
    with new_folder(folder) as work:
        trained = open_trained(reader, config, work, averaged=averaged)
        if form == "adapter":
            refuse_other_models(trained)
            write_adapters(reader, trained.model, trained.config, work, averaged=averaged)
        else:
            write_hf_folder(trained, work)


def _write_compared(trained: TrainedModel, work: Path, options: ExportOptions) -> Deployment:
    """Write the model, run it, and say what it is and how good."""
    if options.format == "hf":
        refuse_other_models(trained)
    not_compared: str | None = None
    reads_texts = trained.facts.vocab_size is not None
    try:
        held_out = find_held_out(trained, options.allowed, is_scored=options.dtype != "fp32")
        # Adapters are merged in a program, and beside the weights in what it is compared with.
        is_apart = trained.has_adapters and options.format != "hf"
        _refuse_lack_of_memory(trained, num_models=3 if is_apart else 2)
        model = trained.as_trained()
        call = record_call(trained.task, model, next(held_out.batches()), reads_texts=reads_texts)
    except UserError as error:
        if options.format != "hf":
            raise
        if not options.accept_loss:
            raise UserError(f"{error} --accept-loss writes it without a comparison.") from None
        not_compared = str(error)
        write_hf_folder(trained, work, options.dtype)
        deployment = _description(trained, options, [], [], None)
    else:
        deployment = _write(trained, trained.materialized() if is_apart else model, call, work, options)
        comparison = compare(trained.task, model, call, open_exported(work, deployment, trained, call), held_out)
        found = quality(comparison, held_out, trained.config.evaluation.monitor)
        if not options.accept_loss:
            refuse_loss(comparison, found, options.dtype)
        deployment = deployment.model_copy(update={"quality": found})
    write_deployment(deployment, work)
    write_card(trained, deployment, not_compared, work)
    return deployment


def _write(trained: TrainedModel, model: nn.Module, call: ModelCall, work: Path, options: ExportOptions) -> Deployment:
    """Write the model, and say what it is."""
    if options.format == "hf":
        write_hf_folder(trained, work, options.dtype)
        return _description(trained, options, *call_specs(call), None)
    program = export_program(model, call, options.dtype, options.format)
    inputs, outputs = program_specs(program, call)
    if options.format == "onnx":
        write_onnx(program, inputs, outputs, work / FILES["onnx"])
    else:
        save_program(program, work / FILES["torch-export"])
    return _description(trained, options, inputs, outputs, max_program_length(program))


def _description(
    trained: TrainedModel,
    options: ExportOptions,
    inputs: list[TensorSpec],
    outputs: list[TensorSpec],
    max_length: int | None,
) -> Deployment:
    limits = [max_length, None if trained.facts.vocab_size is None else _max_tokens(trained)]
    manifest = trained.reader.manifest
    return Deployment(
        format=options.format,
        file=FILES[options.format],
        task=trained.config.task.name,
        output_kind=_output_kind(trained.task),
        classes=list(trained.facts.classes),
        inputs=inputs,
        outputs=outputs,
        max_length=min((limit for limit in limits if limit is not None), default=None),
        normalize=_text_form(trained),
        dtype=options.dtype,
        quality=None,
        run=RunRecord(
            name=trained.config.name,
            step=manifest.training.step,
            averaged=trained.averaged,
            data_fingerprint=manifest.data_fingerprint,
            revision=trained_revision(trained.reader),
            version=package_version("shardline"),
        ),
    )


def _refuse_lack_of_memory(trained: TrainedModel, num_models: int) -> None:
    """Assert that all models of a comparison fit in what is free, for a process that is killed says nothing.

    Raises:
        UserError: they do not.
    """
    needed = num_models * sum(trained.weights.parameter_bytes(name) for name in trained.weights.parameter_names())
    free = psutil.virtual_memory().available
    if needed > free:
        raise UserError(
            f"the trained model and the exported one need {needed / 2**30:.1f} GiB to be compared, and "
            f"{free / 2**30:.1f} are free; export it on a machine with more memory."
        )


def _max_tokens(trained: TrainedModel) -> int | None:
    """The most tokens of a text: of rows as many as are read of one, else as many as the model has positions for."""
    if trained.recipe is not None:
        return trained.recipe.sequence_length
    model_config = getattr(trained.model, "config", None)
    return None if model_config is None else max_positions(model_config)


def _text_form(trained: TrainedModel) -> TextForm | None:
    reads_texts = trained.facts.vocab_size is not None and trained.config.data.source != "factory"
    return trained.config.data.normalize if reads_texts else None


def _output_kind(task: Task) -> OutputKind:
    if isinstance(task, TokenClassification):
        return "tags"
    if isinstance(task, Classification):
        return "binary" if task.num_outputs == 1 else "classes"
    if isinstance(task, Regression):
        return "number"
    return "tokens" if isinstance(task, CausalLanguageModelling | MaskedLanguageModelling) else "values"


def _refuse_sparse(options: ExportOptions, what: str) -> None:
    """Assert that weights are to be stored as they are.

    Raises:
        UserError: they are not.
    """
    if options.sparse:
        raise UserError(
            f"--sparse is a form of the weights that --format hf writes, and none of {what}; leave one out."
        )


def _refuse_formats_of_adapters(options: ExportOptions) -> None:
    for option, value, only in (("--format", options.format, "hf"), ("--dtype", options.dtype, "fp32")):
        if value != only:
            raise UserError(
                f"{option} {value} --adapter: adapters alone are written as peft loads them, in fp32; give --merge for "
                f"a whole model in that form, or leave out {option}."
            )
