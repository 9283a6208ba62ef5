"""Causal language modelling: predict each next token."""

import math
from collections.abc import Mapping
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from sharding.engine import Batch
from sharding.precision import CONVERTS_ITS_OUTPUT
from sharding.ranks.errors import UserError
from trainer.architectures.auto_model import auto_model
from trainer.architectures.networks import build_network
from trainer.config.sections import ModelConfig
from trainer.data.facts import SampleFacts
from trainer.data.samples import Samples
from trainer.data.token_bytes import token_bytes
from trainer.tasks.chunked_loss import ChunkedLossHead
from trainer.tasks.divergence import token_logits
from trainer.tasks.first_batch import ForwardPass
from trainer.tasks.next_tokens import IGNORED_LABEL, next_token_batch
from trainer.tasks.scores import bits_per_byte, perplexity
from trainer.tasks.task import Better, Metric, Outputs, Sums, Task
from trainer.tasks.vocabulary_loss import compiled_vocabulary_loss, vocabulary_loss

PROBED_POSITION = "probed_position"
"""Key of a batch in evaluation that asks for the logits of the first row's token at this position, as the only sum."""


class CausalLanguageModelling(Task):
    """Next-token prediction; ``labels[b, t]`` is the token that follows ``input_ids[b, t]``, or -100."""

    def __init__(
        self,
        z_loss: float = 0.0,
        chunk_tokens: int = 0,
        facts: SampleFacts | None = None,
        *,
        compiles_loss: bool = False,
    ) -> None:
        """Say which loss, and how it is computed.

        Args:
            z_loss: coefficient of the z-loss; 0 trains on the cross-entropy alone.
            chunk_tokens: positions whose logits exist at once; 0 means all of a micro-batch.
            facts: of the samples, whose tokenizer tells how many bytes of text a token is; None leaves bits per byte
                out.
            compiles_loss: whether the training loss is compiled, once for each shape of logits, and with the output
                projection where that works in chunks.
        """
        self._facts = facts or SampleFacts()
        self._z_loss = z_loss
        self._chunk_tokens = chunk_tokens
        self._compiles_loss = compiles_loss
        # Which a model of transformers would fill; one that a factory makes is not asked.
        self._without_cache = {"use_cache": False}
        self._forward_pass = ForwardPass()
        self._heads: WeakKeyDictionary[nn.Module, ChunkedLossHead] = WeakKeyDictionary()

    def build_model(self, model_settings: ModelConfig, facts: SampleFacts) -> nn.Module:
        """See Task."""
        if model_settings.factory is not None:
            if self._chunk_tokens:
                raise UserError(
                    f"task.loss_chunk_tokens={self._chunk_tokens} needs a model of transformers, but model.factory="
                    f"{model_settings.factory} makes another; set it to 0."
                )
            self._without_cache = {}
            return build_network(model_settings, facts, facts.vocab_size)
        model: Any = auto_model("causal-lm", model_settings, facts)
        if self._chunk_tokens:
            head = model.get_output_embeddings()
            if type(head) is not nn.Linear:
                raise UserError(
                    f"task.loss_chunk_tokens={self._chunk_tokens} works where logits come from a plain nn.Linear, but "
                    f"{model.config.model_type} makes them with {type(head).__name__}; set it to 0."
                )
            ChunkedLossHead.take_over(head, self._chunk_tokens, self._z_loss, is_compiled=self._compiles_loss)
        elif self._compiles_loss:
            setattr(model, CONVERTS_ITS_OUTPUT, True)
        return model

    def make_batch(self, samples: Batch, positions: torch.Tensor, training: bool) -> Batch:
        """See Task; each token's label is the one that follows.

        For evaluation with ``num_bytes``, int64 [micro], of the text that a row's targets stand for, where the
        tokenizer tells.
        """
        batch = next_token_batch(samples, positions)
        if not training and (table := self._bytes_by_token) is not None:
            of_labels = torch.where(batch["labels"] == IGNORED_LABEL, 0, table[batch["labels"].clamp(min=0)])
            batch["num_bytes"] = of_labels.sum(dim=1)
        return batch

    def inputs(self, batch: Batch) -> Batch:
        """See Task; positions that start again within a row make transformers mask attention by document."""
        return {name: batch[name] for name in ("input_ids", "position_ids") if name in batch}

    def forward(self, model: nn.Module, batch: Batch) -> Outputs:
        """See Task; logits are [micro, length, vocabulary], of the probed token alone [vocabulary]."""
        if PROBED_POSITION in batch:
            return Outputs(logits=self._logits_at(model, batch))
        if self._chunk_tokens:
            return Outputs(loss_sum=self._chunked_loss(model, batch))
        logits = self._logits(model, batch)
        # In fp32 here, so that those of another format are gone when the loss is computed; but compiled they become so
        # on the way.
        return Outputs(logits=logits if self._compiles_loss else logits.float())

    def loss(self, outputs: Outputs, batch: Batch) -> torch.Tensor:
        """See Task; ``vocabulary_loss``, with the z-loss."""
        if outputs.loss_sum is not None:
            return outputs.loss_sum
        compute = compiled_vocabulary_loss() if self._compiles_loss else vocabulary_loss
        return compute(_logits_of(outputs), batch["labels"], self._z_loss)

    def evaluate(self, outputs: Outputs, batch: Batch) -> Sums:
        """See Task; summed cross-entropy and valid targets: never a z-loss, so that perplexity means perplexity."""
        if PROBED_POSITION in batch:
            assert outputs.logits is not None, "a probe asks for logits"
            return {"logits": outputs.logits}
        # A head that computes the loss leaves the z-loss out in evaluation.
        loss_sum = outputs.loss_sum
        if loss_sum is None:
            loss_sum = vocabulary_loss(_logits_of(outputs), batch["labels"])
        num_targets = (batch["labels"] != IGNORED_LABEL).sum()
        sums = {"loss": loss_sum.double(), "targets": num_targets.double()}
        if "num_bytes" in batch:
            sums["bytes"] = batch["num_bytes"].sum().double()
        return sums

    def num_targets(self, batch: Batch) -> int:
        """See Task."""
        return int((batch["labels"] != IGNORED_LABEL).sum())

    def num_tokens(self, batch: Batch) -> int:
        """See Task."""
        return batch["input_ids"].numel()

    def metrics(self, sums: Mapping[str, torch.Tensor]) -> dict[str, Metric]:
        """See Task; mean loss in nats per token, its exponential, and the loss in bits per byte of text."""
        loss = float(sums["loss"]) / max(float(sums["targets"]), 1.0)
        metrics = {"loss": Metric(loss, "lower"), "perplexity": Metric(perplexity(loss), "lower")}
        if "bytes" in sums:
            bits = bits_per_byte(float(sums["loss"]), float(sums["bytes"]))
            metrics["bits_per_byte"] = Metric(bits, "lower")
        return metrics

    def class_logits(self, outputs: Outputs, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """See Task; without logits that stand for no token."""
        return token_logits(outputs, batch, self._facts)

    @cached_property
    def _bytes_by_token(self) -> torch.Tensor | None:
        """Bytes of each token's text, int64 [vocabulary]."""
        folder, vocab_size = self._facts.tokenizer_dir, self._facts.vocab_size
        return None if folder is None or vocab_size is None else token_bytes(folder, vocab_size)

    def directions(self) -> dict[str, Better]:
        """See Task."""
        # Before there is a tokenizer, nobody can say that it does not tell.
        has_bytes = self._facts.tokenizer_dir is None or self._bytes_by_token is not None
        names = ("loss", "perplexity", *(("bits_per_byte",) if has_bytes else ()))
        return dict.fromkeys(names, "lower")

    def _logits_at(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Logits of the probed token, [vocabulary]."""
        position = batch[PROBED_POSITION]
        if not self._chunk_tokens:
            return self._logits(model, batch)[0, position].float()
        head = next(m for m in model.modules() if isinstance(m, ChunkedLossHead))
        head.position = position
        return self._logits(model, batch)[0, 0].float()

    def _logits(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """What the model returns as logits.

        Raises:
            UserError: it cannot compute on its first batch, for sizes that do not fit together.
        """
        described = f"sequences of {batch['input_ids'].shape[1]} tokens"
        return self._forward_pass.logits(model, self.inputs(batch) | self._without_cache, described)

    def _chunked_loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """The summed loss, computed where the model would compute logits."""
        head = self._heads.get(model) or next(m for m in model.modules() if isinstance(m, ChunkedLossHead))
        head.targets = batch["labels"]
        loss = self._logits(model, batch)
        if model not in self._heads:
            # Once, for it waits for the device; but 0 and NaN are what they are whatever is done to them.
            made, given = head.last_loss.item() if head.last_loss is not None else None, loss.mean().item()
            if made and not math.isnan(made):
                if given != made:
                    raise UserError(
                        f"task.loss_chunk_tokens={self._chunk_tokens} does not fit this model, which changes its "
                        "logits after the output projection (by a soft cap or a scale); set it to 0."
                    )
                self._heads[model] = head
        return loss


def predicts_next_tokens(task: Task) -> bool:
    """Whether a task is causal language modelling in all but, perhaps, the model that it builds."""
    task = getattr(task, "inner", task)
    ours = CausalLanguageModelling
    names = ("make_batch", "inputs", "forward", "loss", "evaluate")
    return isinstance(task, ours) and all(getattr(type(task), name) is getattr(ours, name) for name in names)


def check_targets(name: str, task: Task, samples: Samples) -> None:
    """Assert of a task of the user's own that what users say in a conversation is not among its targets.

    Args:
        name: what to call it.
        task: the task.
        samples: of conversations.

    Raises:
        UserError: it has more targets in the first sample than there are.
    """
    first = samples.read("train", [0])
    most = int(first["is_target"][:, 1:].sum())
    found = task.num_targets(task.make_batch(first, torch.zeros(1, dtype=torch.long), training=True))
    if found > most:
        raise UserError(
            f"task.name={name} has {found} targets in the first sample, in which {most} tokens are the assistant's; "
            "make its batches with trainer.tasks.next_tokens.next_token_batch, or read is_target of the samples."
        )


def _logits_of(outputs: Outputs) -> torch.Tensor:
    assert outputs.logits is not None, "the head computes the loss or the logits"
    return outputs.logits
