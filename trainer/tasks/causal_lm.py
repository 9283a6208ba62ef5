"""Causal language modelling: predict each next token."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional

from sharding.engine import Batch

if TYPE_CHECKING:
    from transformers import PretrainedConfig

IGNORED_LABEL = -100


class CausalLanguageModelling:
    """Next-token prediction; ``labels[b, t]`` is the token that follows ``input_ids[b, t]``, or -100."""

    def build_model(self, model_config: "PretrainedConfig") -> nn.Module:
        """See Task."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_config(model_config, dtype=torch.float32)

    def make_batch(self, sequences: Batch) -> Batch:
        """See Task; packed sequences are the batch."""
        return sequences

    def num_targets(self, batch: Batch) -> int:
        """See Task."""
        return int((batch["labels"] != IGNORED_LABEL).sum())

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """See Task; cross-entropy in nats, computed in fp32."""
        # Positions that start again within a row make transformers mask attention by document.
        inputs = {name: batch[name] for name in ("input_ids", "position_ids") if name in batch}
        logits = model(**inputs, use_cache=False).logits
        return functional.cross_entropy(
            logits.flatten(0, 1).float(), batch["labels"].flatten(), reduction="sum", ignore_index=IGNORED_LABEL
        )

    def evaluation_sums(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """See Task; [summed loss, valid targets]."""
        num_targets = (batch["labels"] != IGNORED_LABEL).sum()
        return torch.stack([self.loss(model, batch).double(), num_targets.double()])

    def evaluation_metrics(self, sums: Sequence[float]) -> dict[str, Any]:
        """See Task; mean loss in nats per token and its exponential."""
        loss_sum, num_targets = sums
        loss = loss_sum / max(num_targets, 1.0)
        # exp overflows a float beyond 709; such a model has no useful perplexity.
        perplexity = math.exp(loss) if loss < 700 else math.inf
        return {"eval/loss": loss, "eval/perplexity": perplexity}
