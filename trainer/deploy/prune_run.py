"""A run that is pruned at once: another run, which begins where a checkpoint of the first one is."""

import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sharding.blocks import layer_weights
from sharding.config import ParallelConfig
from sharding.part import Part, whole_part
from sharding.ranks.errors import UserError
from sharding.ranks.process_group import Ranks
from sharding.state import MASK_PREFIX, MODEL_PREFIX, SQUARE_PREFIX
from trainer.checkpoint.base import BaseKeeper
from trainer.checkpoint.rank_file import write_rank_file
from trainer.checkpoint.reader import CheckpointReader
from trainer.checkpoint.training_state import MonitorState
from trainer.checkpoint.writer import CheckpointIdentity, commit_checkpoint, prepare_checkpoint
from trainer.config import RunConfig, config_to_yaml, parse_config
from trainer.config.prune import BY_GRADIENTS, PruneConfig
from trainer.config.prune_rules import validate_prune
from trainer.config.rules import World
from trainer.config.secrets import redact_values
from trainer.deploy.allowed_code import AllowedCode
from trainer.deploy.new_folder import refuse_contents
from trainer.deploy.trained_model import check_checkpoint, open_trained
from trainer.files.atomic_files import write_atomically
from trainer.files.outages import cannot_be_written
from trainer.optimizers.prune_choice import pruned_parameters
from trainer.optimizers.prune_masks import PruneInputs, clear_pruned, shrink_masks
from trainer.optimizers.pruning import SECOND_MOMENT
from trainer.run_folder.events import record_event
from trainer.run_folder.folder import RunFolder
from trainer.run_folder.provenance import collect_provenance, provenance_file

_ALONE = Ranks(rank=0, world_size=1, local_rank=0, local_world_size=1, device=torch.device("cpu"))


@dataclass(frozen=True)
class PrunedParameter:
    """How many weights a parameter has, and how many of them are left."""

    name: str
    num_weights: int
    num_kept: int


def prune_run(
    reader: CheckpointReader,
    run: str,
    folder: Path,
    settings: Mapping[str, Any],
    allowed: AllowedCode,
    argv: Sequence[str] = (),
) -> list[PrunedParameter]:
    """Write a run that is a checkpoint of another with the least weights, their moments and averages at zero.

    It has the same settings but for ``name``, ``output_dir``, ``checkpoint.from`` and ``prune``; its one checkpoint has
    masks, so that whatever goes on with it keeps the zeros. The whole state of the checkpoint is in memory meanwhile.

    Args:
        reader: the checkpoint.
        run: the run that it is of, as a person names it.
        folder: of the run that is written; new or empty.
        settings: of the section ``prune`` but for ``begin`` and ``end``, which are the checkpoint's step.
        allowed: the Python code that may run, to build the model.
        argv: the command, for the record.

    Returns:
        What is left of each parameter, in the model's order.

    Raises:
        UserError: the checkpoint is corrupt or asks for code that is not allowed, its state has nothing to judge by,
            settings do not fit, nothing would be left of a parameter, or the folder has contents or cannot be written.
    """
    refuse_contents(folder)
    config = check_checkpoint(reader, averaged=False, allowed=allowed)
    if config.model.lora.rank:
        raise UserError(
            f"{run} trains adapters (model.lora.rank={config.model.lora.rank}) beside weights that stay as they are; "
            "export it with --merge, and begin another run with that (model.pretrained)."
        )
    step = reader.manifest.training.step
    pruned_config = _config_of(config, run, step, folder, settings)
    prune = pruned_config.prune
    if not prune.sparsity:
        raise UserError("--sparsity 0 prunes nothing; give a share of the weights, such as 0.5.")
    validate_prune(pruned_config, None)
    with tempfile.TemporaryDirectory(prefix="shardline-prune-") as work:
        model = open_trained(reader, config, Path(work), averaged=False).model
    trained = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    names = pruned_parameters(prune, layer_weights(model), trained)
    parts = {name: _read(reader, name) for name in reader.tensors if not name.startswith(SQUARE_PREFIX)}
    by_gradients = prune.by in BY_GRADIENTS
    squares = [_mean_square(reader, parts, name, prune, run) for name in names] if by_gradients else []
    for name in names:
        weight = parts[f"{MODEL_PREFIX}{name}"].tensor
        mask = torch.ones_like(weight, dtype=torch.bool)
        parts.setdefault(f"{MASK_PREFIX}{name}", whole_part(f"{MASK_PREFIX}{name}", mask))
    masks = {name: parts[f"{MASK_PREFIX}{name}"].tensor for name in names}
    weights = [parts[f"{MODEL_PREFIX}{name}"] for name in names]
    shrink_masks(prune, prune.sparsity, PruneInputs(weights, list(masks.values()), squares), num_ranks=1)
    for part in parts.values():
        clear_pruned(part, masks)
    _write(reader, pruned_config, parts, argv)
    return [PrunedParameter(name, mask.numel(), int(mask.sum())) for name, mask in masks.items()]


def _config_of(config: RunConfig, run: str, step: int, folder: Path, settings: Mapping[str, Any]) -> RunConfig:
    """The pruned run's configuration.

    Raises:
        UserError: a setting is none, or a run cannot have the folder's name.
    """
    parallel = config.parallel
    if parallel.backend == "deepspeed":
        # It cannot go on with masks, and strategies are called the same under torch.
        parallel = ParallelConfig(strategy=parallel.strategy)
    values = config.model_dump(mode="json") | {
        "name": folder.name,
        "output_dir": str(folder.parent),
        "prune": {**settings, "begin": step, "end": step},
        "parallel": parallel.model_dump(mode="json"),
    }
    values["checkpoint"] |= {"from": f"{run}@{step}", "load": "all"}
    return parse_config(values, source=f"shardline prune --to {folder}", has_rules=False)


def _read(reader: CheckpointReader, name: str) -> Part:
    entry = reader.tensors[name]
    part = whole_part(name, torch.empty(entry.shape, dtype=getattr(torch, entry.dtype)))
    reader.read_into(part)
    return part


def _mean_square(
    reader: CheckpointReader, parts: Mapping[str, Part], name: str, prune: PruneConfig, run: str
) -> torch.Tensor:
    """The mean squared gradient of each weight of a parameter."""
    moment = parts.get(f"optimizer/{name}/{SECOND_MOMENT}")
    if moment is not None:
        return moment.tensor
    if f"{SQUARE_PREFIX}{name}" in reader.tensors:
        return _read(reader, f"{SQUARE_PREFIX}{name}").tensor
    optimizer = reader.manifest.config["optimizer"]["name"]
    raise UserError(
        f"--by {prune.by} judges by AdamW's second moments, which {run} (optimizer.name={optimizer}) does not have of "
        f"{name}; use --by magnitude, or prune while it trains (prune.by={prune.by})."
    )


def _write(reader: CheckpointReader, config: RunConfig, parts: Mapping[str, Part], argv: Sequence[str]) -> None:
    folder, manifest = RunFolder.of(config), reader.manifest
    step, was_there = manifest.training.step, folder.path.exists()
    # What the dense weights were found to be, and where they were shown, is not of these.
    training = manifest.training.model_copy(update={"eval_metrics": {}, "monitor": MonitorState(), "trackers": {}})
    is_own = {name: name in manifest.tensors or name.startswith(MASK_PREFIX) for name in parts}
    own = [part for name, part in parts.items() if is_own[name]]
    frozen = [part for name, part in parts.items() if not is_own[name]]
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        base = BaseKeeper(folder.checkpoints_dir, _ALONE, lambda: None)
        base.keep(frozen, step, lambda: None, lambda: None)
        identity = CheckpointIdentity(
            config=config.model_dump(mode="json"),
            data_fingerprint=manifest.data_fingerprint,
            strategy="none",
            tokenizer=manifest.tokenizer,
            recipe_file=manifest.recipe_file,
            base=base.name,
            precision_rule=manifest.precision_rule,
        )
        checkpoint = folder.checkpoint_path(step)
        prepare_checkpoint(checkpoint, own, step, _ALONE, lambda: None)
        report = write_rank_file(checkpoint, own, 0, attachments=reader.read_attachments())
        commit_checkpoint(checkpoint, report, training, identity, _ALONE, lambda: None)
        provenance = redact_values(collect_provenance(config, World(1, has_gpu=False), list(argv)), os.environ)
        write_atomically(provenance_file(folder.path, 1), json.dumps(provenance, indent=2) + "\n", owner_only=True)
        record_event(folder.path, "pruned", attempt=1, step=step, source=config.checkpoint.from_)
        folder.write_outcome("finished", 0, step, f"pruned from {config.checkpoint.from_}")
        # Last, for it is what makes a folder a run.
        write_atomically(folder.config_file, config_to_yaml(config))
    except BaseException as error:
        shutil.rmtree(folder.path, ignore_errors=True)
        if was_there:
            folder.path.mkdir(exist_ok=True)
        if isinstance(error, OSError):
            raise cannot_be_written("run folder", folder.path, error) from None
        raise
