"""An exported model with weights of fewer bits, beside what it was made of: size, speed and quality."""

import shutil
from pathlib import Path

import torch

from sharding.ranks.errors import UserError
from trainer.config.quantization import QuantizationMethod
from trainer.deploy.compare import Reference, compare_folders, open_folder, speeds
from trainer.deploy.loaded import is_exported_model
from trainer.deploy.model_card import CARD_NAME
from trainer.deploy.new_folder import new_folder
from trainer.deploy.quantization_result import Quantized, card_lines
from trainer.deploy.quantize_onnx import quantize_onnx
from trainer.deploy.quantize_torch import quantize_transformers
from trainer.deploy.signature import DEPLOYMENT_NAME, Deployment, read_deployment, write_deployment
from trainer.deploy.sparse_folder import SPARSE_ENDING
from trainer.deploy.verify_export import quality, refuse_loss

_WEIGHT_SUFFIXES = (".safetensors", ".onnx", ".data", ".pt2", ".index.json")


def quantize_folder(
    folder: Path, to: Path, method: QuantizationMethod, reference: Reference, *, accept_loss: bool = False
) -> Quantized:
    """Write an exported model once more with quantized weights, having loaded and compared what was written.

    Args:
        folder: the exported model.
        to: the new folder.
        method: how weights are quantized.
        reference: samples that the model was not trained on, and their task.
        accept_loss: whether to keep a model whose metric is worse by more than half a point.

    Raises:
        UserError: the folder cannot be quantized so, no kernel runs it, or the metric is worse than the trained model's
            by more than half a point, what the export has lost included, and that is not accepted; then there is no new
            folder.
    """
    deployment = _described(folder)
    if deployment is not None:
        _check_reference(deployment, folder, reference)
        if deployment.format == "torch-export":
            raise UserError(
                f"{folder} holds a program of torch.export, whose weights are part of it; export with --format onnx or "
                "hf and quantize that."
            )
    with new_folder(to) as work:
        _copy_all_but_weights(folder, work)
        if deployment is not None and deployment.format == "onnx":
            share = quantize_onnx(folder / deployment.file, work / deployment.file, method)
        else:
            share = quantize_transformers(folder, work, method)
        before, after = (open_folder(place, deployment) for place in (folder, work))
        comparison = compare_folders(before, after, reference)
        found = quality(comparison, reference.held_out, reference.monitor)
        if not accept_loss:
            dtype, earlier = ("fp32", None) if deployment is None else (deployment.dtype, deployment.quality)
            refuse_loss(comparison, found, dtype, is_quantized=True, earlier=earlier)
        quantized = Quantized(
            method=method,
            format="hf" if deployment is None else deployment.format,
            share=share,
            size_bytes=(model_bytes(folder), model_bytes(work)),
            speeds=speeds(before, after, reference),
            quality=found,
            source=reference.source,
            num_threads=torch.get_num_threads(),
        )
        if deployment is not None:
            write_deployment(deployment.model_copy(update={"quantization": method, "quality": found}), work)
        card = work / CARD_NAME
        if card.exists():
            card.write_text("\n".join([card.read_text().rstrip("\n"), "", *card_lines(quantized), ""]))
    return quantized


def model_bytes(folder: Path) -> int:
    """Bytes of the files of a folder that hold the model."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.name.endswith(_WEIGHT_SUFFIXES))


def _described(folder: Path) -> Deployment | None:
    """What a folder says of itself; None of one of transformers that says nothing."""
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; name one that shardline export has written.")
    if any(folder.glob(f"*{SPARSE_ENDING}")):
        raise UserError(f"{folder} was exported with --sparse, whose form nothing computes with; export without it.")
    if is_exported_model(str(folder)) and not (folder / DEPLOYMENT_NAME).exists():
        return None
    deployment = read_deployment(folder)
    if deployment.quantization is not None:
        raise UserError(
            f"{folder} is quantized already, by {deployment.quantization}; name the folder that it was made of."
        )
    return deployment


def _check_reference(deployment: Deployment, folder: Path, reference: Reference) -> None:
    """Assert that samples are of the data that the model was trained on, read as it has learnt to read them."""
    if reference.data_fingerprint not in (None, deployment.run.data_fingerprint):
        raise UserError(
            f"{folder} is a model of run {deployment.run.name}, which was trained on other data than {reference.run}, "
            "so that it may have seen what is held out there; name its own run by --run, or files by --data."
        )
    if reference.task_name != deployment.task:
        raise UserError(
            f"{folder} is a model for task.name={deployment.task}, and the samples are for {reference.task_name}; name "
            "its own run by --run, or files by --data."
        )


def _copy_all_but_weights(folder: Path, work: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir():
            shutil.copytree(path, work / path.name)
        elif not path.name.endswith(_WEIGHT_SUFFIXES):
            shutil.copyfile(path, work / path.name)
