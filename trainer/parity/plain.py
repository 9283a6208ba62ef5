"""The side of parity that is known to be right: one process with torch alone, which shares no code with the engines."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

from sharding.engine import Batch
from trainer.architectures.config import build_model_config
from trainer.config import RunConfig
from trainer.data.facts import SampleFacts
from trainer.parity.cases import (
    LOSS_SCALE,
    NUM_STEPS,
    ParityCase,
    Trajectory,
    case_lr,
    case_model,
    compared_task,
    is_plain_language_modelling,
    num_rows_of,
    rows_of_micro_batches,
)
from trainer.parity.optimizers import plain_optimizer
from trainer.parity.plain_teacher import ClassLogits, PlainTeacher
from trainer.parity.restriction import restrict
from trainer.parity.rounding import round_parameters

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class _Plain:
    """A model and what is computed with it: its outputs of a batch, their summed loss, and logits at targets."""

    model: nn.Module
    forward: Callable[[Batch], Any]
    loss: Callable[[Any, Batch], torch.Tensor]
    class_logits: ClassLogits
    num_targets: Any


def run_plain(
    config: RunConfig, facts: SampleFacts, folder: Path, initial: Path, case: ParityCase, *, normalizes_batches: bool
) -> tuple[Trajectory, dict[str, torch.Tensor], set[str]]:
    """The reference, on the device that ranks have.

    Args:
        config: the run.
        facts: of its samples.
        folder: holds the batch.
        initial: the parameters to begin with.
        case: the optimizer, the format, and the micro-batches where these say what is computed.
        normalizes_batches: whether the model has batch normalisation. Then a micro-batch is the rows that all ranks
            have in one; else the whole batch is.

    Returns:
        What training left behind, the parameters and persistent buffers after it by name, and the names of the
        parameters that were not to change.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch = {name: tensor.to(device) for name, tensor in load_file(folder / "batch.safetensors").items()}
    config = config.model_copy(update={"model": case_model(config.model, case)})
    is_language_model = is_plain_language_modelling(config)
    build = _language_model if is_language_model else _model_of_task
    plain = build(config, facts, batch, initial, device)
    model, num_targets = plain.model, plain.num_targets
    dtype = _DTYPES[case.compute]
    teacher = None if config.distill.teacher is None else PlainTeacher(config, facts, model, initial, device, dtype)

    def loss_sum(batch: Batch) -> torch.Tensor:
        outputs = plain.forward(batch)
        own = plain.loss(outputs, batch)
        return own if teacher is None else teacher.mixed(own, plain.class_logits(outputs, batch), batch)

    micro_batches = _micro_batches(batch, case, normalizes_batches=normalizes_batches)
    if dtype is not torch.float32:
        model.register_forward_pre_hook(partial(_round_inputs, dtype), with_kwargs=True)
    lr, clip_norm = case_lr(config, case.optimizer), config.optimizer.clip_norm
    optimizer = plain_optimizer(model, config.optimizer, case.optimizer, lr)
    losses, norms = [], []
    for _ in range(NUM_STEPS):
        if case.compute == "fp32":
            total = 0.0
            for micro_batch in micro_batches:
                loss = loss_sum(micro_batch) / num_targets
                loss.backward()
                total += loss.item()
        else:
            total = _accumulate_in_16_bits(model, loss_sum, micro_batches, num_targets, case.compute)
        norm = torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None]).norm()
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), clip_norm or torch.inf, norm.float())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
        norms.append(norm.item())
    saved = model.state_dict().keys()
    tensors = [*model.named_parameters(), *(item for item in model.named_buffers() if item[0] in saved)]
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    return Trajectory(losses, norms), {name: tensor.detach().cpu() for name, tensor in tensors}, frozen


def _language_model(config: RunConfig, facts: SampleFacts, batch: Batch, initial: Path, device: torch.device) -> _Plain:
    """A causal language model of transformers, and its cross-entropy written down here."""
    from transformers import AutoModelForCausalLM

    model_config = build_model_config(config.model, facts)
    model = AutoModelForCausalLM.from_config(
        model_config, dtype=torch.float32, trust_remote_code=config.model.trust_remote_code
    )
    restrict(model, config.model)
    model.load_state_dict(load_file(initial), strict=False)
    model.tie_weights()
    model.to(device)

    def forward(batch: Batch) -> torch.Tensor:
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        logits: torch.Tensor = model(**inputs, use_cache=False).logits.float()
        return logits

    return _Plain(
        model,
        forward,
        lambda logits, batch: functional.cross_entropy(
            logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum"
        ),
        lambda logits, batch: (logits[..., : facts.vocab_size], batch["labels"] != -100),
        (batch["labels"] != -100).sum(),
    )


def _model_of_task(config: RunConfig, facts: SampleFacts, batch: Batch, initial: Path, device: torch.device) -> _Plain:
    """The task's own model and loss, without an engine around them, and torch's own layers."""
    task = compared_task(config, facts)
    model: Any = task.build_model(config.model, facts)
    restrict(model, config.model)
    model.load_state_dict(load_file(initial), strict=False)
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    model.to(device).train()
    on_host = {name: tensor.cpu() for name, tensor in batch.items()}
    return _Plain(
        model,
        lambda batch: task.forward(model, batch),
        task.loss,
        lambda outputs, batch: task.class_logits(outputs, batch),
        task.num_targets(on_host),
    )


def _micro_batches(batch: Batch, case: ParityCase, *, normalizes_batches: bool) -> Sequence[Batch]:
    """What goes through the model at once: in fp32 all, where that makes no difference.

    In 16 bits each micro-batch of each rank by itself, after which gradients are rounded.
    """
    rows = rows_of_micro_batches(case, num_rows_of(batch))
    if normalizes_batches:
        return [{name: tensor[of_micro] for name, tensor in batch.items()} for of_micro in rows.flatten(1)]
    if case.compute == "fp32":
        return [batch]
    return [{name: tensor[own] for name, tensor in batch.items()} for own in rows.flatten(0, 1)]


def _accumulate_in_16_bits(
    model: nn.Module,
    loss_sum: Callable[[Batch], torch.Tensor],
    micro_batches: Sequence[Batch],
    num_targets: Any,
    compute: str,
) -> float:
    """Forward and backward passes with rounded parameters, whose gradients are added up in fp32; returns the loss.

    Parameters are what they were afterwards, with those sums as their gradients.
    """
    loss_scale = LOSS_SCALE if compute == "fp16" else 1.0
    parameters = list(model.parameters())
    masters = [parameter.data for parameter in parameters]
    sums: dict[int, torch.Tensor] = {}
    round_parameters(model, _DTYPES[compute])
    total = 0.0
    for micro_batch in micro_batches:
        loss = loss_sum(micro_batch)
        (loss * (loss_scale / num_targets)).backward()
        total += loss.item() / float(num_targets)
        for index, parameter in enumerate(parameters):
            if parameter.grad is not None:
                sums[index] = sums.get(index, 0.0) + parameter.grad.float()
                parameter.grad = None
    for index, (parameter, master) in enumerate(zip(parameters, masters, strict=True)):
        parameter.data = master
        parameter.grad = sums[index] / loss_scale if index in sums else None
    return total


def _round_inputs(dtype: torch.dtype, _: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, {name: x.to(dtype) if _is_floating(x) else x for name, x in kwargs.items()}


def _is_floating(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()
