"""What is compared: one batch of the run's samples with ragged targets, and a run without dropout."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from sharding.engine import Batch
from sharding.ranks.errors import UserError
from trainer.config import RunConfig
from trainer.data.any_samples import prepared_samples
from trainer.data.loader import BatchLoader
from trainer.data.prepared import Prepared
from trainer.data.samples import FILLER
from trainer.model.pretrained import find_folder
from trainer.parity.cases import is_plain_language_modelling
from trainer.tasks.next_tokens import next_token_batch
from trainer.tasks.task import Task

NUM_SAMPLES = 12
"""Divides by 1, 2, 3 and 4 ranks, with and without accumulation."""

_NUM_WITHOUT_TARGET = 3
# Of some architectures: what is hidden of a recording is drawn in every pass.
_DRAWN_MASKS = ("mask_time_prob", "mask_feature_prob")


def write_ragged_batch(config: RunConfig, prepared: Prepared, task: Task, folder: Path) -> None:
    """Write ``batch.safetensors``: samples of the run, of which some have few targets and some micro-batches have none.

    Args:
        config: the run.
        prepared: its samples.
        task: makes a batch of them.
        folder: where to.

    Raises:
        UserError: the batch cannot be divided by samples.
    """
    loader = BatchLoader(
        prepared_samples(prepared, config.data),
        prepared.order(config.seed, config.data),
        global_size=NUM_SAMPLES,
        micro_size=NUM_SAMPLES,
        dp_rank=0,
        dp_degree=1,
    )
    (micro,) = loader.next_step()
    loader.close()
    batch = (
        _cut_texts(micro.samples)
        if is_plain_language_modelling(config)
        else _batch(task, micro.samples, micro.positions)
    )
    for name, tensor in batch.items():
        if tensor.ndim == 0 or len(tensor) != NUM_SAMPLES:
            raise UserError(
                f"parity divides a batch by samples, but {name} of task.name={config.task.name} has shape "
                f"{list(tensor.shape)} for {NUM_SAMPLES} of them; let dim 0 of every tensor of a batch be the sample."
            )
    save_file({name: tensor.contiguous() for name, tensor in batch.items()}, folder / "batch.safetensors")


def _cut_texts(samples: Batch) -> Batch:
    """Cut so that every sample has another number of valid targets and one has none but the first."""
    batch = next_token_batch(samples)
    length = batch["labels"].shape[1]
    for row in range(NUM_SAMPLES):
        num_valid = max(1, length * (row * 7 % NUM_SAMPLES) // (NUM_SAMPLES - 1))
        batch["labels"][row, num_valid:] = -100
    return batch


def _batch(task: Task, samples: Batch, positions: torch.Tensor) -> Batch:
    """The first samples as those that only fill up, so that a whole micro-batch has no target."""
    positions = positions.clone()
    positions[:_NUM_WITHOUT_TARGET] = FILLER
    torch.manual_seed(0)
    return task.make_batch(samples, positions, training=True)


def without_dropout(config: RunConfig, folder: Path) -> RunConfig:
    """The run with dropout 0, since masks differ between layouts: whatever argument of its model is called so.

    Args:
        config: the run.
        folder: where a pretrained model's configuration is written to, beside links to its weights.
    """
    model = config.model
    changes: dict[str, Any] = {"lora": model.lora.model_copy(update={"dropout": 0.0})}
    if model.builtin is not None or model.factory is not None:
        changes["arguments"] = model.arguments | _zeros(model.arguments)
    elif model.architecture is not None:
        from transformers import CONFIG_MAPPING

        if model.architecture in CONFIG_MAPPING:
            changes["config"] = model.config | _zeros(vars(CONFIG_MAPPING[model.architecture]()))
    elif model.pretrained is not None:
        changes["pretrained"] = str(_pretrained_without_dropout(config, folder / "pretrained"))
    return config.model_copy(update={"model": model.model_copy(update=changes)})


def _pretrained_without_dropout(config: RunConfig, folder: Path) -> Path:
    from transformers import CONFIG_MAPPING

    source = find_folder(str(config.model.pretrained))
    values = json.loads((source / "config.json").read_text())
    # What the file leaves out has the class's default; of a class of its own that is not known.
    known = values.get("model_type") in CONFIG_MAPPING
    defaults = vars(CONFIG_MAPPING[values["model_type"]]()) if known else {}
    folder.mkdir()
    for path in source.iterdir():
        (folder / path.name).symlink_to(path.resolve())
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(values | _zeros(defaults | values)))
    return folder


def _zeros(values: dict[str, Any]) -> dict[str, float]:
    return {
        name: 0.0
        for name, value in values.items()
        if isinstance(value, float) and ("drop" in name or name in _DRAWN_MASKS)
    }
