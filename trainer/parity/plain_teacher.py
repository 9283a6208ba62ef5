"""The plain side's teacher: whole, in one piece, and its loss written down here."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from sharding.engine import Batch
from sharding.initialization import Materializer, initialize_tree
from sharding.part import whole_part
from sharding.state import MODEL_PREFIX
from trainer.config import RunConfig
from trainer.config.distill import LayerPair
from trainer.data.facts import SampleFacts
from trainer.distillation.named_teacher import find_teacher
from trainer.distillation.teacher import renormalization, teacher_on_meta
from trainer.parity.rounding import round_parameters

ClassLogits = Callable[[Any, Batch], "tuple[torch.Tensor, torch.Tensor] | None"]
"""Logits and where there is a target, as ``Task.class_logits`` gives them."""

_PROJECTIONS = "distillation_projections"


class PlainTeacher:
    """A teacher without an engine, and the student's blocks that are compared with its own."""

    def __init__(
        self,
        config: RunConfig,
        facts: SampleFacts,
        student: nn.Module,
        initial: Path,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Read all of its weights.

        Args:
            config: the run.
            facts: of its samples.
            student: the plain model, which gets the projections that the run has.
            initial: the parameters to begin with, those of projections among them.
            device: where that computes.
            dtype: format of the teacher's parameters in computing.
        """
        self._settings = config.distill
        source = teacher_on_meta(find_teacher(config.distill), config, facts)
        self._task, self._model = source.task, source.model
        materializer = Materializer(torch.device("cpu"))
        for module in self._model.modules():
            materializer.materialize(module)
        # Buffers that are in no file have their values of it.
        initialize_tree(self._model, "", 0, source.initialize)
        saved = self._model.state_dict().keys()
        for name, tensor in (*self._model.named_parameters(), *self._model.named_buffers()):
            if name in saved:
                source.read(whole_part(f"{MODEL_PREFIX}{name}", tensor.data))
        self._model.to(device).eval()
        round_parameters(self._model, dtype)
        self._dtype = dtype
        self._renormalize = renormalization(facts, source.facts)
        self._student_states: dict[LayerPair, torch.Tensor] = {}
        self._states: dict[LayerPair, torch.Tensor] = {}
        projections = _projections(initial) if self._settings.projection else {}
        for pair in self._settings.layers:
            # Projected within the forward pass: in which order a state's uses come says how their gradients round.
            _keep(student, pair[0], pair, self._student_states, projections.get(f"{pair[0]}_to_{pair[1]}"))
            _keep(self._model, pair[1], pair, self._states)
        if projections:
            # Where the optimizer finds them, under the names that they have in the engines' models.
            student.add_module(_PROJECTIONS, nn.ModuleDict(projections).to(device))

    def mixed(self, own: torch.Tensor, found: Any, batch: Batch) -> torch.Tensor:
        """The loss of a batch, summed over targets.

        Args:
            own: the task's.
            found: the student's logits, and where there is a target.
            batch: what they are of.
        """
        settings, (logits, is_target) = self._settings, found
        with torch.no_grad():
            taught = self._renormalize(batch)
            taught = self._task.padded(taught) if hasattr(self._task, "padded") else taught
            inputs = {name: x.to(self._dtype) if x.is_floating_point() else x for name, x in taught.items()}
            answer = self._task.class_logits(self._task.forward(self._model, inputs), taught)
        assert answer is not None, "the task tells classes apart"
        # One target after another, by the definition.
        p = (answer[0][is_target].double() / settings.temperature).softmax(dim=-1)
        q = (logits[is_target].double() / settings.temperature).softmax(dim=-1)
        if settings.top_k is not None:
            p, q = _of_likeliest(p, q, settings.top_k)
        divergence = (p * (p.log() - q.log())).sum() * settings.temperature**2
        loss = (1 - settings.weight) * own + settings.weight * divergence.float()
        for pair in settings.layers:
            squares = (self._student_states[pair].float() - self._states[pair].float()) ** 2
            loss = loss + settings.layer_weight * _at_targets(squares, is_target, batch.get("attention_mask"))
        return loss


def _of_likeliest(p: torch.Tensor, q: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities [targets, classes] of the likeliest by ``p``, and where these are not all, of the others together.

    Args:
        p: the teacher's.
        q: the student's.
        top_k: how many.
    """
    order = p.argsort(dim=-1, descending=True)
    both = [of.gather(-1, order) for of in (p, q)]
    if top_k >= p.shape[-1]:
        return both[0], both[1]
    first, second = (torch.cat([of[:, :top_k], of[:, top_k:].sum(dim=-1, keepdim=True)], dim=-1) for of in both)
    return first, second


def _projections(initial: Path) -> dict[str, nn.Linear]:
    found = {}
    for name, values in load_file(initial).items():
        if name.startswith(f"{_PROJECTIONS}."):
            matrix = nn.Linear(values.shape[1], values.shape[0], bias=False)
            matrix.weight.data.copy_(values)
            found[name.removeprefix(f"{_PROJECTIONS}.").removesuffix(".weight")] = matrix
    return found


def _keep(
    model: nn.Module,
    number: int,
    pair: LayerPair,
    states: dict[LayerPair, torch.Tensor],
    projection: nn.Linear | None = None,
) -> None:
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    # As the outermost lists come, whose elements all have parameters.
    inner = {id(other) for one in lists for element in one for other in element.modules()}
    blocks = [element for one in lists if id(one) not in inner for element in one]

    def hook(_: nn.Module, __: Any, output: Any) -> None:
        state = output if isinstance(output, torch.Tensor) else output[0]
        states[pair] = state if projection is None else state @ projection.weight.T

    blocks[number].register_forward_hook(hook)


def _at_targets(squares: torch.Tensor, is_target: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    if is_target.ndim == 1 and mask is not None and squares.ndim == 3:
        lengths = mask.sum(dim=1).tolist()
        means = [row[:length].mean() for row, length in zip(squares, lengths, strict=True)]
        return torch.stack(means)[is_target].sum()
    return squares[is_target].flatten(1).mean(dim=1).sum()
