"""Pruned weights: masks beside the fp32 masters, divided over ranks as they are, and how they come about.

Pruning on a schedule during training: Zhu and Gupta, "To prune, or not to prune" (2017).
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import cached_property

import torch

from sharding.engine import Engine
from sharding.part import Part
from sharding.ranks.errors import UserError
from sharding.ranks.process_group import Ranks
from sharding.state import MASK_PREFIX, MODEL_PREFIX, SQUARE_PREFIX
from trainer.config.optimizer import OptimizerName
from trainer.config.prune import BY_GRADIENTS, PruneConfig, sparsity_after
from trainer.optimizers.prune_choice import keeps_squares, num_pruned
from trainer.optimizers.prune_masks import PruneInputs, clear_pruned, shrink_masks
from trainer.optimizers.prune_selection import sum_over_world
from trainer.optimizers.weight_average import WeightAverage

# Share of the mean of squared gradients that each step keeps.
_DECAY = 0.99
# Where a gradient is zero, these update a weight of zero with moments of zero to zero.
_KEEP_ZEROS = ("adamw", "sgd")
SECOND_MOMENT = "exp_avg_sq"
"""Name of AdamW's mean of squared gradients in the optimizer's state."""


class Pruning:
    """Keeps pruned weights at zero, and prunes more of them when it is time.

    Gradients of pruned weights are zero before the norm is taken, and moments are zeroed once. Under AdamW and SGD the
    weights then stay zero by themselves; under others they are set to zero after each step.
    """

    def __init__(
        self,
        engine: Engine,
        config: PruneConfig,
        optimizer: OptimizerName,
        names: Sequence[str],
        ranks: Ranks,
        *,
        average: WeightAverage | None = None,
        refusal: str = "",
        inform: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Begin with nothing pruned.

        Args:
            engine: holds the weights; its parts must stay where they are in memory.
            config: when and what is pruned.
            optimizer: which updates them.
            names: parameters that are pruned, see ``pruned_parameters``; empty where sparsity is 0.
            ranks: this rank's place.
            average: is pruned as the weights are.
            refusal: why masks cannot be kept, as a setting and its value with a reason; empty where they can.
            inform: tells a person; called on every rank.
        """
        self._engine = engine
        self._config = config
        self._ranks = ranks
        self._average = average
        self._refusal = refusal
        self._inform = inform
        self._trained = [name for name, parameter in engine.named_parameters() if parameter.requires_grad]
        self._names = list(names)
        self._clears_after_step = optimizer not in _KEEP_ZEROS
        self._masks = {name: self._new_mask(name) for name in names}
        self._squares = {name: self._new_square(name) for name in (names if keeps_squares(config, optimizer) else ())}
        self._num_pruned = 0

    def metrics(self) -> dict[str, float | None]:
        """Share of the weights that is pruned, of those that may be; nothing where none may."""
        return {"train/sparsity": self._num_pruned / self._num_weights} if self._masks else {}

    def state(self) -> list[Part]:
        """This rank's parts of masks, ``mask/PARAMETER``, and of mean squares, ``square/PARAMETER``; live."""
        return [*self._masks.values(), *self._squares.values()]

    def load(
        self,
        stored: Collection[str],
        read: Callable[[Part], None],
        *,
        is_own: bool,
        weights_only: bool = False,
        names: Mapping[str, str | None] | None = None,
    ) -> None:
        """Take masks from a checkpoint whose weights were loaded; every rank must call it.

        Args:
            stored: names of all that it has.
            read: fills a part.
            is_own: whether it is one of this run's own; of another's, masks are taken as ``prune.keep_masks`` says.
            weights_only: whether nothing else but weights was taken.
            names: which parameters have another name there, None for those that were not loaded.

        Raises:
            UserError: it has masks, and this run cannot keep them.
        """
        sources = {name: (names or {}).get(name, name) for name in self._trained}
        found = {name: source for name, source in sources.items() if f"{MASK_PREFIX}{source}" in stored}
        if found and not is_own and not self._config.keep_masks:
            self._inform("weights that were pruned in what this run begins with are trained again")
            found = {}
        if found and self._refusal:
            raise UserError(
                f"this run begins with pruned weights, which {self._refusal}; change that, or set "
                "prune.keep_masks=false to train all weights."
            )
        self._masks = {name: self._new_mask(name) for name in self._trained if name in {*self._names, *found}}
        for name, source in found.items():
            read(replace(self._masks[name], name=f"{MASK_PREFIX}{source}"))
        for part in self._squares.values():
            if part.name in stored and not weights_only:
                read(part)
            else:
                part.tensor.zero_()
        self._count()
        if found and not is_own:
            self._inform(f"{self._num_pruned:,} weights of {self._num_weights:,} were pruned before, and stay zero")

    def begin(self, step: int) -> None:
        """Prune what is due before the step after ``step``; every rank must call it.

        Raises:
            UserError: the time to prune is over, or see ``shrink_masks``.
        """
        if not self._config.sparsity:
            return
        self._prune_if_due(step)
        num_weights = sum(math.prod(self._weights[name].global_shape) for name in self._names)
        # Counts of each layer are rounded.
        reached = self._num_pruned + len(self._names) >= num_pruned(num_weights, self._config.sparsity)
        if step > self._config.end and not reached:
            raise UserError(
                f"prune.end={self._config.end} is over at step {step}, with which this run begins, so that "
                f"prune.sparsity={self._config.sparsity:g} would not be reached; set prune.begin and prune.end to "
                "later steps, or checkpoint.load=weights to begin at step 0."
            )

    def mask_gradients(self) -> None:
        """Take away the gradients of pruned weights; between ``train_batch`` and ``clip_grad_norm``."""
        if not self._num_pruned:
            return
        gradients = self._engine.named_local_gradients()
        for name, mask in self._masks.items():
            if name in gradients:
                gradients[name].masked_fill_(~mask.tensor, 0.0)

    def add_gradients(self, grad_norm: torch.Tensor) -> None:
        """Take the gradients into the mean of squares, unless their norm is not finite; between clipping and step."""
        if not self._squares:
            return
        gradients, is_finite = self._engine.named_local_gradients(), grad_norm.isfinite()
        for name, part in self._squares.items():
            # What no gradient has come to has one of zero under other strategies.
            square = gradients[name].square() if name in gradients else torch.zeros_like(part.tensor)
            part.tensor.copy_(torch.where(is_finite, part.tensor.lerp(square, 1.0 - _DECAY), part.tensor))

    def after_step(self, step: int) -> None:
        """Keep zeros, and prune what is due after a step; every rank must call it.

        Raises:
            AgreedError: see ``shrink_masks``.
        """
        if self._clears_after_step and self._num_pruned:
            for name, mask in self._masks.items():
                self._weights[name].tensor.masked_fill_(~mask.tensor, 0.0)
        self._prune_if_due(step)

    def _prune_if_due(self, step: int) -> None:
        sparsity = sparsity_after(self._config, step)
        if sparsity is None:
            return
        weights = [self._weights[name] for name in self._names]
        masks = {name: mask.tensor for name, mask in self._masks.items()}
        inputs = PruneInputs(weights, [masks[name] for name in self._names], self._mean_squares(step))
        shrink_masks(self._config, sparsity, inputs, self._ranks.world_size)
        # By way of the engine, which may have to tell copies in another format of the new masters. Before the first
        # step there are no moments.
        self._engine.load_state(lambda part: clear_pruned(part, masks), with_optimizer=step > 0)
        for part in self._average.state() if self._average is not None else ():
            clear_pruned(part, masks)
        self._count()
        if step == self._config.end:
            share = f"{self._num_pruned:,} of {self._num_weights:,}"
            self._inform(f"{share} weights are pruned by {self._config.by} after step {step}")

    def _mean_squares(self, step: int) -> list[torch.Tensor]:
        if self._config.by not in BY_GRADIENTS:
            return []
        if self._squares:
            return [self._squares[name].tensor for name in self._names]
        if not step:
            return [torch.zeros_like(self._weights[name].tensor) for name in self._names]
        moments = {part.name: part.tensor for part in self._engine.state(with_optimizer=True)}
        return [moments[f"optimizer/{name}/{SECOND_MOMENT}"] for name in self._names]

    @cached_property
    def _weights(self) -> dict[str, Part]:
        """Part of each parameter; taken where there are masks alone, for of files DeepSpeed makes copies in memory."""
        parts = {part.name.removeprefix(MODEL_PREFIX): part for part in self._engine.state(with_optimizer=False)}
        return {name: parts[name] for name in self._trained}

    def _new_mask(self, name: str) -> Part:
        weight = self._weights[name]
        return replace(weight, name=f"{MASK_PREFIX}{name}", tensor=torch.ones_like(weight.tensor, dtype=torch.bool))

    def _new_square(self, name: str) -> Part:
        weight = self._weights[name]
        return replace(weight, name=f"{SQUARE_PREFIX}{name}", tensor=torch.zeros_like(weight.tensor))

    @property
    def _num_weights(self) -> int:
        return sum(math.prod(mask.global_shape) for mask in self._masks.values())

    def _count(self) -> None:
        device = self._ranks.device
        own = [(~mask.tensor).sum() for mask in self._masks.values() if mask.is_written_here]
        total = torch.stack(own).sum() if own else torch.zeros((), dtype=torch.int64, device=device)
        self._num_pruned = int(sum_over_world(total, self._ranks.world_size))
