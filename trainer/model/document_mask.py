"""Proof, before training, that the model keeps the documents of a sequence apart."""

import inspect

import torch

from sharding.engine import Engine
from sharding.ranks.errors import UserError
from trainer.config import RunConfig
from trainer.data.facts import SampleFacts
from trainer.data.packed import packed_rows
from trainer.model.models import build_model_on_meta
from trainer.tasks.next_tokens import IGNORED_LABEL
from trainer.tasks.task import Task

# A loss in fp32 has 24 bits, and experts may see their tokens in other groups; what leaks through attention is more.
_TOLERANCE = 1e-6


def check_architecture(config: RunConfig, task: Task, facts: SampleFacts) -> None:
    """Refuse models that cannot be told where a document starts.

    Raises:
        UserError: the model carries a state from token to token, or takes no positions.
    """
    model = build_model_on_meta(task, config.model, facts)
    if getattr(model, "_is_stateful", False):
        raise _refusal(config, "is recurrent: its state runs on from one document into the next")
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise _refusal(config, "takes no position_ids, by which transformers tells documents apart")


def check_engine(engine: Engine, config: RunConfig, task: Task, facts: SampleFacts) -> None:
    """Change the first document of each row and see that the loss of the second stays as it is.

    Which of the many attention implementations honour positions is nowhere declared; so the very model that will be
    trained is asked, in evaluation. Every rank must call it.

    Raises:
        UserError: the loss changed.
    """
    length, rows = config.data.sequence_length, config.batch.micro_size
    if length < 3:
        return
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(facts.vocab_size or 1, (2, rows, length), generator=generator)
    border = length // 2
    tokens[1, :, border:] = tokens[0, :, border:]
    # One more, which is only there to be predicted.
    tokens = torch.cat([tokens, tokens[:, :, -1:]], dim=-1)
    starts = (torch.arange(length + 1) % border == 0) & (torch.arange(length + 1) <= border)
    batches = []
    for row in tokens.numpy():
        samples = packed_rows(row, is_start=starts.expand(rows, -1).numpy())
        batch = task.make_batch(samples, torch.arange(rows), training=False)
        if "labels" in batch:
            # One target, close to the border, feels a leak most: nearly all that it could see is foreign.
            batch["labels"][:, torch.arange(length) != border] = IGNORED_LABEL
            # Those of the labels that were there before.
            batch.pop("num_bytes", None)
        batches.append(batch)
    one, other = engine.evaluate(batches)
    if not torch.allclose(one.double().cpu(), other.double().cpu(), rtol=_TOLERANCE, atol=0.0):
        raise _refusal(config, "attends across documents all the same")


def _refusal(config: RunConfig, reason: str) -> UserError:
    name = config.model.name
    attention = config.model.attention
    # transformers looks for documents in a batch of one row only.
    remedy = "batch.micro_size=1, " if attention.startswith("flash") and config.batch.micro_size > 1 else ""
    return UserError(
        f"data.document_mask=true does not work with {name} under model.attention={attention}: it {reason}; choose "
        f"{remedy}another model.attention or architecture (llama, qwen3, gpt2 under sdpa, say), or set it to false."
    )
