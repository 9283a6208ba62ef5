"""Tasks as a user writes them, for tests: ``tests.trainer.tasks.own_tasks:NAME``."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import AutoModelForMaskedLM, LlamaForCausalLM

from sharding.engine import Batch
from trainer.architectures.config import build_model_config
from trainer.tasks.causal_lm import CausalLanguageModelling


class _Bigrams(nn.Module):
    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, 8)
        self.layers = nn.ModuleList([nn.Linear(8, 8)])
        self.head = nn.Linear(8, vocab_size)

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> Any:
        return SimpleNamespace(logits=self.head(self.layers[0](self.embedding(input_ids))))


class _ScaledLlama(LlamaForCausalLM):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = 2 * output.logits
        return output


class OwnModule(CausalLanguageModelling):
    """A model that is no model of `transformers`."""

    def build_model(self, model_settings: Any, facts: Any) -> nn.Module:
        return _Bigrams(facts.vocab_size)


class OwnClass(CausalLanguageModelling):
    """The names and shapes of a model of `transformers`, but another forward pass."""

    def build_model(self, model_settings: Any, facts: Any) -> nn.Module:
        return _ScaledLlama(build_model_config(model_settings, facts))


class MaskedLanguageModel(CausalLanguageModelling):
    """A model of `transformers` that does not continue text."""

    def build_model(self, model_settings: Any, facts: Any) -> nn.Module:
        return AutoModelForMaskedLM.from_config(build_model_config(model_settings, facts), dtype=torch.float32)


class NotesWhatItIsGiven(CausalLanguageModelling):
    """Writes a line for each batch that it makes into the folder of its options."""

    def __init__(self, options: Any, facts: Any) -> None:
        super().__init__()
        self._folder, self._facts = Path(options["folder"]), facts

    def make_batch(self, samples: Batch, positions: torch.Tensor, training: bool) -> Batch:
        facts = {"vocab_size": self._facts.vocab_size, "sequence_length": self._facts.sequence_length}
        with (self._folder / f"rank-{dist.get_rank()}.jsonl").open("a") as file:
            file.write(json.dumps({"positions": positions.tolist(), "training": training} | facts) + "\n")
        return super().make_batch(samples, positions, training)


class StartsAtOne(CausalLanguageModelling):
    """The linear layers that make hidden states wider have initial values of their own."""

    def initialize(self, model: nn.Module, module: nn.Module) -> None:
        super().initialize(model, module)
        if isinstance(module, nn.Linear) and module.in_features < module.out_features < 100:
            nn.init.ones_(module.weight)
