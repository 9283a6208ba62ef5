"""A small model with everything that makes a layout stumble, its engines, and one plain process beside them."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from sharding.blocks import hidden_matrices
from sharding.build_engine import build_engine
from sharding.engine import Batch, Engine, ModelDefinition
from sharding.memory_formula import BUCKET_ELEMENTS
from sharding.mesh import build_mesh
from sharding.ranks.object_exchange import sum_integers_over_ranks
from sharding.ranks.process_group import Ranks
from sharding.state import layout_independent_hash
from tests.saved_state import stored_state
from tests.sharding.engine_cases import tiny_config
from trainer.checkpoint.reader import CheckpointReader
from trainer.config.deepspeed_settings import deepspeed_settings
from trainer.optimizers.build import optimizer_factory

NUM_ROWS = 24
_WIDTH = 7
_VOCABULARY = 11
LR = 1e-2
# Large, so that what is decayed and should not be stands out.
WEIGHT_DECAY = 0.5


class _Block(nn.Module):
    """A residual layer with a persistent buffer of each kind that models have, which take part in the result."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(_WIDTH, _WIDTH)
        self.outer = nn.Linear(_WIDTH, _WIDTH, bias=False)
        # One row, so that all ranks but one have none of it.
        self.gate = nn.Linear(_WIDTH, 1)
        self.never_used = nn.Linear(_WIDTH, 3)
        self.register_buffer("shift", torch.empty(_WIDTH))
        self.register_buffer("mask", torch.empty(_WIDTH, dtype=torch.bool))
        self.register_buffer("count", torch.empty((), dtype=torch.int64))
        self.register_buffer("frequencies", torch.empty(_WIDTH), persistent=False)

    def reset_parameters(self) -> None:
        self.shift.copy_(torch.randn(_WIDTH))
        self.mask.copy_(torch.rand(_WIDTH) > 0.5)
        self.count.fill_(int(torch.randint(2, 9, ())))
        self.frequencies.copy_(torch.arange(_WIDTH) / _WIDTH)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        inner = torch.where(self.mask, self.inner(hidden + self.shift), hidden * self.frequencies) / self.count
        return hidden + self.outer(inner.tanh()) * self.gate(hidden).sigmoid()


class NastyModel(nn.Module):
    """Four blocks: one is frozen, two share a matrix, and one does with a module that is registered last, run first."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([_Block(), _Block(), _Block(), _Block()])
        self.layers[2].inner.weight = self.layers[1].inner.weight
        self.layers[0].requires_grad_(False)
        self.embedding = nn.Embedding(_VOCABULARY, _WIDTH)
        self.early = nn.Linear(_WIDTH, _WIDTH)
        self.early.weight = self.layers[3].outer.weight
        self.head = nn.Linear(_WIDTH, _VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight
        self.never_used = nn.Parameter(torch.empty(3))
        self.sometimes_used = nn.Linear(_WIDTH, _WIDTH)

    def reset_parameters(self) -> None:
        with torch.no_grad():
            self.never_used.fill_(1.0)

    def forward(self, tokens: torch.Tensor, step: int) -> torch.Tensor:
        hidden = self.early(self.embedding(tokens)).tanh()
        if step % 2:
            # A gradient of zero, which is decayed, and is not the same as none.
            hidden = hidden + 0.0 * self.sometimes_used(hidden)
        for layer in self.layers:
            hidden = layer(hidden)
        return self.head(hidden)


def loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Summed cross-entropy of each token's successor."""
    logits = model(batch["tokens"], int(batch["step"][0]))
    return functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum")


def _initialize(module: nn.Module) -> None:
    reset: Any = getattr(module, "reset_parameters", None)
    if reset is not None:
        reset()


def nasty_engine(
    ranks: Ranks, backend: str, strategy: str, optimizer: str = "adamw", trained: str = "", **sections: Any
) -> Engine:
    """An engine of the model with its initial parameters.

    Args:
        ranks: the ranks.
        backend: of the strategy.
        strategy: the strategy.
        optimizer: its name.
        trained: parameters whose names do not begin so are frozen.
        sections: other sections of the configuration.
    """
    parallel: dict[str, Any] = {"strategy": strategy, "backend": backend}
    if strategy == "hsdp":
        parallel["replicate"] = 2
    settings = {"name": optimizer, "lr": LR, "weight_decay": WEIGHT_DECAY}
    batch = {"global_size": NUM_ROWS, "micro_size": NUM_ROWS // ranks.world_size // 2}
    config = tiny_config(parallel, optimizer=settings, batch=batch, **sections)
    mesh = build_mesh(config.parallel, ranks)
    # All of it would lie in one bucket.
    BUCKET_ELEMENTS["cpu"] = 256
    with torch.device("meta"):
        model = NastyModel()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and name.startswith(trained))
    return build_engine(
        ModelDefinition(model, _initialize, loss, lambda m, batch: loss(m, batch).double()[None], seed=3),
        mesh,
        ranks.device,
        optimizer_factory(config.optimizer, hidden_matrices(model)),
        parallel=config.parallel,
        precision=config.precision,
        activation_checkpointing=config.activation_checkpointing,
        compilation=config.compile,
        deepspeed_settings=deepspeed_settings(config, mesh.dims) if backend == "deepspeed" else {},
    )


def _global_batch(step: int) -> Batch:
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, _VOCABULARY, (NUM_ROWS, 6), generator=generator)
    return {"tokens": tokens[:, :-1], "labels": tokens[:, 1:], "step": torch.full((NUM_ROWS,), step)}


def share_of(ranks: Ranks, step: int) -> tuple[list[Batch], int]:
    """This rank's part of a step's batch, in two micro-batches, and the targets of the whole."""
    batch = _global_batch(step)
    num_rows = NUM_ROWS // ranks.world_size // 2
    micro_batches = [
        {name: tensor.split(num_rows)[2 * ranks.rank + index] for name, tensor in batch.items()} for index in range(2)
    ]
    return micro_batches, batch["labels"].numel()


def train(engine: Engine, ranks: Ranks, steps: range) -> list[float]:
    """Train; returns this rank's loss sums."""
    losses = []
    for step in steps:
        losses.append(float(engine.train_batch(*share_of(ranks, step))))
        engine.clip_grad_norm(1.0)
        engine.step(LR)
    return losses


def train_plainly(state: dict[str, torch.Tensor], steps: range) -> dict[str, torch.Tensor]:
    """What one process that knows torch alone makes of a canonical state: the model's tensors after AdamW's steps."""
    model = NastyModel()
    missing = model.load_state_dict({name.removeprefix("model/"): t for name, t in state.items()}, strict=False)
    assert {name.rpartition("/")[0] for name in missing.unexpected_keys} <= {
        f"optimizer/{n}" for n, _ in model.named_parameters()
    }
    for layer in model.layers:
        layer.frequencies.copy_(torch.arange(_WIDTH) / _WIDTH)
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p], "weight_decay": WEIGHT_DECAY if p.ndim >= 2 else 0.0} for p in trained]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), eps=1e-8)
    for step in steps:
        batch = _global_batch(step)
        optimizer.zero_grad()
        (loss(model, batch) / batch["labels"].numel()).backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
    return {name: tensor.detach() for name, tensor in (*model.named_parameters(), *model.named_buffers())}


def load(engine: Engine, folder: Path) -> None:
    """Continue from a checkpoint that verifies."""
    reader = CheckpointReader(folder)
    reader.verify()
    engine.load_state(reader.read_into, with_optimizer=True)


def whole_state(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, put together from its slices."""
    return stored_state(folder)


def state_hash(engine: Engine, ranks: Ranks) -> int:
    """A hash of the model's state that every rank knows."""
    return sum_integers_over_ranks(layout_independent_hash(engine.state(with_optimizer=False)), ranks)
