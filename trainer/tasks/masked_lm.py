"""Masked language modelling: predict tokens that are hidden, from those before and after them."""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from sharding.engine import Batch
from sharding.precision import CONVERTS_ITS_OUTPUT
from sharding.ranks.errors import UserError
from trainer.architectures.auto_model import auto_model
from trainer.architectures.networks import build_network
from trainer.config.sections import ModelConfig
from trainer.data.facts import SampleFacts
from trainer.data.samples import FILLER
from trainer.data.tokenizer import load_tokenizer
from trainer.data.words import WordTable, word_table
from trainer.tasks.divergence import token_logits
from trainer.tasks.first_batch import ForwardPass
from trainer.tasks.next_tokens import IGNORED_LABEL
from trainer.tasks.scores import perplexity
from trainer.tasks.task import Better, Metric, Outputs, Sums, Task
from trainer.tasks.vocabulary_loss import compiled_vocabulary_loss, vocabulary_loss

_MASKED, _REPLACED = 0.8, 0.9


class MaskedLanguageModelling(Task):
    """Prediction of hidden tokens; ``labels[b, t]`` is the token that was at that place, or -100 where none is asked.

    As in BERT (Devlin et al., 2019): of the chosen tokens 80 % are masked, 10 % replaced by any other and 10 % left.
    """

    def __init__(
        self,
        facts: SampleFacts,
        seed: int = 0,
        mask_probability: float = 0.15,
        *,
        whole_word: bool = False,
        compiles_loss: bool = False,
    ) -> None:
        """Say what is hidden.

        Args:
            facts: of the samples: tokens, whose tokenizer has a mask token.
            seed: key of the draws.
            mask_probability: with which a token, or a word, is chosen.
            whole_word: choose words instead of tokens.
            compiles_loss: whether the training loss is compiled, once for each shape of logits.
        """
        self._facts = facts
        self._seed = seed
        self._mask_probability = mask_probability
        self._whole_word = whole_word
        self._compiles_loss = compiles_loss
        self._table: WordTable | None = None
        self._forward_pass = ForwardPass()

    def build_model(self, model_settings: ModelConfig, facts: SampleFacts) -> nn.Module:
        """See Task.

        Raises:
            UserError: `transformers` has no such head for the architecture, or the model is made to look back alone.
        """
        if model_settings.factory is not None:
            return build_network(model_settings, facts, facts.vocab_size)
        model: Any = auto_model("masked-lm", model_settings, facts)
        if getattr(model.config, "is_decoder", False):
            raise UserError(
                f"{model_settings.name} has is_decoder=true, with which a token sees none that follow, but "
                "task.name=masked-lm predicts from both sides; set it to false."
            )
        if self._compiles_loss:
            setattr(model, CONVERTS_ITS_OUTPUT, True)
        return model

    def make_batch(self, samples: Batch, positions: torch.Tensor, training: bool) -> Batch:
        """See Task; what is hidden of a sample follows from the seed and its position alone."""
        table, mask_id = self._words()
        tokens = samples["tokens"][:, :-1].numpy()
        num_tokens = samples["num_tokens"].numpy()
        is_token = np.arange(tokens.shape[1]) < num_tokens[:, None]
        draws = self._draws(positions, tokens.shape[1], training=training)
        chance = draws[0]
        if self._whole_word:
            chance = np.take_along_axis(chance, table.word_numbers(tokens), axis=1)
        is_target = (chance < self._mask_probability) & table.is_text[tokens] & is_token
        is_target &= (positions != FILLER).numpy()[:, None]
        text_ids = np.flatnonzero(table.is_text)
        others = text_ids[(draws[2] * len(text_ids)).astype(np.int64)]
        hidden = np.where(draws[1] < _MASKED, mask_id, np.where(draws[1] < _REPLACED, others, tokens))
        inputs = np.where(is_target, hidden, tokens)
        if not is_token.all():
            inputs = np.where(is_token, inputs, self._facts.pad_token_id or 0)
        batch = {
            "input_ids": torch.from_numpy(inputs),
            "labels": torch.from_numpy(np.where(is_target, tokens, IGNORED_LABEL)),
        }
        # Only where it hides something: transformers looks into it, for which a GPU would have to be waited for.
        return batch if is_token.all() else batch | {"attention_mask": torch.from_numpy(is_token.astype(np.int64))}

    def inputs(self, batch: Batch) -> Batch:
        """See Task."""
        return {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}

    def forward(self, model: nn.Module, batch: Batch) -> Outputs:
        """See Task; logits are [micro, length, vocabulary].

        Raises:
            UserError: the model cannot compute on its first batch, for sizes that do not fit together.
        """
        described = f"sequences of {batch['input_ids'].shape[1]} tokens"
        logits = self._forward_pass.logits(model, self.inputs(batch), described)
        # In fp32 here, so that those of another format are gone when the loss is computed; but compiled they become so
        # on the way.
        return Outputs(logits=logits if self._compiles_loss else logits.float())

    def loss(self, outputs: Outputs, batch: Batch) -> torch.Tensor:
        """See Task; cross-entropy in nats, computed in fp32."""
        assert outputs.logits is not None, "forward gives logits"
        compute = compiled_vocabulary_loss() if self._compiles_loss else vocabulary_loss
        return compute(outputs.logits, batch["labels"], 0.0)

    def evaluate(self, outputs: Outputs, batch: Batch) -> Sums:
        """See Task; summed cross-entropy, hidden tokens, and those of them that were found."""
        assert outputs.logits is not None, "forward gives logits"
        is_right = outputs.logits.argmax(dim=-1) == batch["labels"]
        return {
            "loss": vocabulary_loss(outputs.logits, batch["labels"]).double(),
            "targets": (batch["labels"] != IGNORED_LABEL).sum().double(),
            "right": is_right.sum().double(),
        }

    def num_targets(self, batch: Batch) -> int:
        """See Task."""
        return int((batch["labels"] != IGNORED_LABEL).sum())

    def num_tokens(self, batch: Batch) -> int:
        """See Task."""
        return batch["input_ids"].numel()

    def metrics(self, sums: Mapping[str, torch.Tensor]) -> dict[str, Metric]:
        """See Task; of hidden tokens the mean loss in nats, its exponential, and the share that was found."""
        num_targets = max(float(sums["targets"]), 1.0)
        loss = float(sums["loss"]) / num_targets
        return {
            "loss": Metric(loss, "lower"),
            "perplexity": Metric(perplexity(loss), "lower"),
            "accuracy": Metric(float(sums["right"]) / num_targets, "higher"),
        }

    def class_logits(self, outputs: Outputs, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """See Task; without logits that stand for no token."""
        return token_logits(outputs, batch, self._facts)

    def directions(self) -> dict[str, Better]:
        """See Task."""
        return {"loss": "lower", "perplexity": "lower", "accuracy": "higher"}

    def _draws(self, positions: torch.Tensor, length: int, *, training: bool) -> np.ndarray:
        """Uniform draws [3, micro, length], each row's from a key of its own."""
        digest = hashlib.sha256(f"{self._seed}:mask:{'training' if training else 'evaluation'}".encode()).digest()
        key = int.from_bytes(digest[:8], "little")
        # Position -1 fills up; the key is unsigned.
        rows = []
        for position in positions.tolist():
            # Counter-based (Salmon et al., "Parallel random numbers", 2011): each key gives a stream of its own. It is
            # unsigned, but a sample that only fills up has position -1.
            stream = np.random.Philox(key=np.array([key, position & (2**64 - 1)], dtype=np.uint64))
            rows.append(np.random.Generator(stream).random((3, length)))
        return np.stack(rows, axis=1)

    def _words(self) -> tuple[WordTable, int]:
        """What the vocabulary tells of words and control tokens, looked at once, and the mask token.

        Raises:
            UserError: the tokenizer has no mask token.
        """
        facts = self._facts
        if facts.mask_token_id is None or facts.tokenizer_dir is None or facts.vocab_size is None:
            raise UserError(
                "task.name=masked-lm needs tokens whose tokenizer has a mask token; set data.mask_token=true."
            )
        if self._table is None:
            self._table = word_table(load_tokenizer(str(facts.tokenizer_dir), masks=True), facts.vocab_size)
        return self._table, facts.mask_token_id
