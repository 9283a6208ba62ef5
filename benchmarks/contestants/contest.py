"""What all contestants share: model, initial parameters, data, optimizer, schedule, and what they report."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

from benchmarks.measure.turns import StepEdge
from sharding.engine import Batch
from sharding.parallel_dims import parallel_dims
from sharding.ranks.process_group import Ranks
from trainer.architectures.config import build_model_config
from trainer.config import RunConfig
from trainer.config.rules import accumulation_steps
from trainer.data.batch import pinned
from trainer.data.packed import packed_samples, sample_facts
from trainer.data.prepare import PreparedCorpus
from trainer.data.samples import Samples
from trainer.optimizers.schedules import learning_rate
from trainer.tasks.next_tokens import IGNORED_LABEL, next_token_batch


@dataclass(frozen=True)
class Contest:
    """One size of the contest on one rank.

    Attributes:
        config: the run that all contestants train.
        ranks: this rank's place.
        corpus: where sequences come from.
        initial: the parameters that all start from, by name.
        num_steps: steps that anyone will take at most.
        compute_dtype: format of matrix products.
        folder: scratch space of this rank's contestants.
    """

    config: RunConfig
    ranks: Ranks
    corpus: PreparedCorpus
    initial: Mapping[str, torch.Tensor]
    num_steps: int
    compute_dtype: torch.dtype
    folder: Path

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches of one rank in one step."""
        return accumulation_steps(self.config, parallel_dims(self.config.parallel, self.ranks.world_size))

    @property
    def uses_bf16(self) -> bool:
        """Whether matrix products are bf16; fp32 otherwise."""
        return self.compute_dtype is torch.bfloat16

    def is_logged(self, step: int) -> bool:
        """Whether metrics of a step, counted from 1, are logged."""
        return step % self.config.metrics.every_steps == 0

    def build_model(self) -> nn.Module:
        """A transformers model with the initial parameters, on this rank's device, in training mode."""
        from transformers import AutoModelForCausalLM

        facts = sample_facts(self.corpus, self.config.data)
        model_config = build_model_config(self.config.model, facts)
        model: nn.Module = AutoModelForCausalLM.from_config(model_config, dtype=torch.float32)
        model.to(self.ranks.device).train()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(self.initial[name])
        return model

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Fused AdamW, vectors not decayed."""
        groups, options = self.optimizer_arguments(model)
        return torch.optim.AdamW(groups, **options)

    def optimizer_arguments(self, model: nn.Module) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """The groups of parameters of torch's AdamW, and its other arguments."""
        settings = self.config.optimizer
        groups = [
            {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": settings.weight_decay},
            {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
        ]
        return groups, {"lr": settings.lr, "betas": settings.betas, "eps": settings.eps, "fused": True}

    def build_schedule(
        self, optimizer: torch.optim.Optimizer, calls_per_step: int = 1
    ) -> torch.optim.lr_scheduler.LambdaLR:
        """The run's learning rates as torch's scheduler.

        Args:
            optimizer: whose rate is set.
            calls_per_step: how often the scheduler's ``step`` is called in one optimizer step.
        """
        peak, schedule = self.config.optimizer.lr, self.config.schedule

        def factor(num_calls: int) -> float:
            return learning_rate(num_calls // calls_per_step + 1, peak, schedule, schedule.total_steps) / peak

        return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)

    def dataset(self, *, with_shift_labels: bool = False) -> "PackedSequences":
        """All sequences of the contest, in the order in which Shardline visits them.

        Args:
            with_shift_labels: give the labels also under the name that transformers has for shifted ones.
        """
        order = self.corpus.order(self.config.seed, self.config.data)
        indices = order.indices(np.arange(self.num_steps * self.config.batch.global_size))
        return PackedSequences(packed_samples(self.corpus, self.config.data), indices.tolist(), with_shift_labels)

    def build_loader(self) -> DataLoader[Batch]:
        """Micro-batches of this rank as torch's documentation has it: DataLoader and DistributedSampler.

        Within a step the ranks divide the sequences otherwise than Shardline does; the step's sequences are the same.
        No worker processes: to read a batch from mapped memory costs less than to receive it from another process.
        """
        dataset = self.dataset()
        world_size, rank = self.ranks.world_size, self.ranks.rank
        sampler: DistributedSampler[Batch] = DistributedSampler(dataset, world_size, rank, shuffle=False)
        return DataLoader(dataset, batch_size=self.config.batch.micro_size, sampler=sampler, collate_fn=as_read)


class PackedSequences(Dataset[Batch]):
    """Packed sequences by position; a whole batch is read at once, into pinned memory where there is a GPU."""

    def __init__(self, samples: Samples, indices: list[int], with_shift_labels: bool = False) -> None:
        """Serve the sequences ``indices[position]`` of the training split."""
        self._samples = samples
        self._indices = indices
        self._with_shift_labels = with_shift_labels

    def __len__(self) -> int:
        """Positions."""
        return len(self._indices)

    def __getitem__(self, position: int) -> Batch:
        """One sequence as a batch of one."""
        return self.__getitems__([position])

    def __getitems__(self, positions: Sequence[int]) -> Batch:
        """Called by DataLoader for a batch; see ``trainer.tasks.next_tokens.next_token_batch``."""
        indices = [self._indices[position] for position in positions]
        batch = pinned(next_token_batch(self._samples.read("train", indices)))
        return batch | {"shift_labels": batch["labels"]} if self._with_shift_labels else batch


def as_read(batch: Any) -> Any:
    """Collates nothing: the data set reads whole batches."""
    return batch


def ddp_options() -> dict[str, Any]:
    """DistributedDataParallel for speed: gradients are views of its buckets, buffers are not broadcast."""
    parameters = inspect.signature(DistributedDataParallel.__init__).parameters
    # torch 2.13 renamed the argument.
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in parameters else "broadcast_buffers"
    return {"gradient_as_bucket_view": True, buffers: False}


def count_targets(batches: Sequence[Batch]) -> torch.Tensor:
    """Valid targets of some micro-batches, an int64 scalar where the labels are."""
    return torch.stack([(batch["labels"] != IGNORED_LABEL).sum() for batch in batches]).sum()


def summed_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy summed over targets, in fp32; the loss that Shardline's task computes."""
    return functional.cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten(), reduction="sum", ignore_index=IGNORED_LABEL
    )


@dataclass
class StepLog:
    """What a contestant logged, as it logged it.

    Attributes:
        losses: mean loss by step.
        grad_norms: norm of the whole gradient before it was clipped, by step.
        rates: learning rate by step, as the contestant's scheduler tells it.
        averaged_over: steps that one loss is the mean of.
    """

    losses: dict[int, float] = field(default_factory=dict)
    grad_norms: dict[int, float] = field(default_factory=dict)
    rates: dict[int, float] = field(default_factory=dict)
    averaged_over: int = 1

    def add(self, step: int, loss: torch.Tensor, grad_norm: torch.Tensor | None, rate: float | torch.Tensor) -> None:
        """Keep one step's metrics; waits for the device."""
        self.losses[step] = loss.item()
        self.grad_norms[step] = grad_norm.item() if grad_norm is not None else math.nan
        self.rates[step] = float(rate)


class Contestant(Protocol):
    """One way to train; a contestant inherits from it.

    Attributes:
        name: what it is called in results.
        settings: how it is set up, for the reader of a result.
        trains: whether it does the work of the contest; what does not is timed beside it.
    """

    name: str
    settings: dict[str, Any]
    trains: bool = True

    def run(self, step_edge: StepEdge) -> None:
        """Train; call ``step_edge`` after each step, for as long as it returns."""

    def settle(self) -> None:
        """Wait for communication that a step has left under way; called in the contestant's thread, at its edge."""
        return

    def step_log(self) -> StepLog:
        """What was logged so far; asked between steps, on rank 0."""
        raise NotImplementedError


BuildContestant = Callable[[Contest], Contestant]
