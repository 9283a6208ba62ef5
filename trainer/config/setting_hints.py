"""What works in place of a setting or a value that does not: names of other frameworks, and slips. Imports no torch."""

import difflib
from collections.abc import Iterator, Sequence
from typing import Any, get_args

from pydantic import BaseModel

_SETTINGS = {
    "learning_rate": "optimizer.lr",
    "max_lr": "optimizer.lr",
    "wd": "optimizer.weight_decay",
    "grad_clip": "optimizer.clip_norm",
    "max_grad_norm": "optimizer.clip_norm",
    "batch_size": "batch.global_size",
    "global_batch_size": "batch.global_size",
    "train_batch_size": "batch.global_size",
    "micro_batch_size": "batch.micro_size",
    "per_device_train_batch_size": "batch.micro_size",
    "gradient_accumulation_steps": "batch.global_size (accumulation steps follow from it)",
    "max_steps": "steps",
    "num_steps": "steps",
    "train_steps": "steps",
    "num_epochs": "epochs",
    "num_train_epochs": "epochs",
    "seq_len": "data.sequence_length",
    "seq_length": "data.sequence_length",
    "max_seq_len": "data.sequence_length",
    "block_size": "data.sequence_length",
    "warmup": "schedule.warmup_steps",
    "warmup_ratio": "schedule.warmup_fraction",
    "scheduler": "schedule.name",
    "lr_scheduler_type": "schedule.name",
    "dtype": "precision.compute",
    "bf16": "precision.compute",
    "fp16": "precision.compute",
    "mixed_precision": "precision.compute",
    "fsdp": "parallel.strategy=zero3",
    "save_steps": "checkpoint.every_steps",
    "save_every": "checkpoint.every_steps",
    "save_total_limit": "checkpoint.keep_last",
    "resume_from_checkpoint": "checkpoint.resume",
    "eval_steps": "evaluation.every_steps",
    "eval_every": "evaluation.every_steps",
    "early_stopping_patience": "evaluation.patience",
    "metric_for_best_model": "evaluation.monitor",
    "mlm_probability": "task.mask_probability",
    "logging_steps": "metrics.every_steps",
    "log_every": "metrics.every_steps",
    "gradient_checkpointing": "activation_checkpointing.mode",
    "attn_implementation": "model.attention",
    "dataset": "data.source and data.paths or data.hub_name",
    "wandb_project": "tracking.wandb.project",
    "num_gpus": "launch.nproc_per_node",
}
_VALUES = {
    "optimizer.name": {"adam": "adamw", "adam_w": "adamw", "fused_adam": "adamw", "adamw_torch": "adamw"},
    "parallel.strategy": {
        **dict.fromkeys(("fsdp", "fsdp1", "fsdp2", "full_shard", "deepspeed", "zero"), "zero3"),
        "shard_grad_op": "zero2",
        "hybrid_shard": "hsdp",
        "dp": "ddp",
        "no_shard": "ddp",
        "single": "none",
    },
    "precision.compute": {
        "float32": "fp32",
        "float": "fp32",
        "bfloat16": "bf16",
        "float16": "fp16",
        "half": "fp16",
        "float8": "fp8",
    },
    "model.attention": dict.fromkeys(("flash", "flash_attention", "fa2"), "flash_attention_2"),
}


def setting_hint(location: Sequence[str], root: type[BaseModel]) -> str:
    """What to write in place of an unknown setting: the nearest name in its section, or the same name in another.

    Args:
        location: the setting, part by part.
        root: the model of the whole configuration.
    """
    section = root
    for part in location[:-1]:
        if part.isdigit():
            # An element of a list of sections.
            continue
        inner = _section_of(section, part)
        if inner is None:
            return ""
        section = inner
    leaf, names = location[-1], _names(section)
    prefix = ".".join(location[:-1])
    # A slip in a name goes before a name of others, and a loose likeness comes last.
    for cutoff in (0.8, 0.5):
        if close := difflib.get_close_matches(leaf, names, n=1, cutoff=cutoff):
            return f"; did you mean {'.'.join([*location[:-1], close[0]])}?"
        elsewhere = [key for key in _keys(root) if key.rpartition(".")[2] == leaf]
        if known := _SETTINGS.get(leaf.lower(), " or ".join(elsewhere[:3])):
            return f"; it is {known} here."
    return f"; {prefix or 'the top level'} has {', '.join(names)}."


def value_hint(key: str, value: Any, choices: Sequence[str]) -> str:
    """Which of the choices was probably meant; empty where none is near.

    Args:
        key: the setting.
        value: what it was given.
        choices: what it takes.
    """
    text = str(value).lower()
    meant = _VALUES.get(key, {}).get(text)
    if meant not in choices:
        meant = next(iter(difflib.get_close_matches(text, choices, n=1, cutoff=0.6)), None)
    return f"; did you mean {meant}?" if meant else ""


def list_hint(key: str, value: Any) -> str:
    """How a list is written, where a person wrote its elements without brackets."""
    elements = [part.strip() for part in value.split(",")] if isinstance(value, str) else [str(value)]
    return f"; write a list: {key}='[{', '.join(elements)}]'"


def _names(model: type[BaseModel]) -> list[str]:
    return [field.alias or name for name, field in model.model_fields.items()]


def _keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every setting that is no section, with its dotted key."""
    for name in _names(model):
        inner = _section_of(model, name)
        if name == "stages":
            # What is in them is in the run's sections too.
            continue
        if inner is None:
            yield f"{prefix}{name}"
        else:
            yield from _keys(inner, f"{prefix}{name}.")


def _section_of(model: type[BaseModel], part: str) -> type[BaseModel] | None:
    for name, field in model.model_fields.items():
        if part in (name, field.alias):
            kinds = (field.annotation, *get_args(field.annotation))
            return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
    return None
