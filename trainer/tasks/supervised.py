"""What tasks have in common that predict labels of rows."""

import inspect
from abc import abstractmethod

import torch
from torch import nn

from sharding.engine import Batch
from sharding.ranks.errors import UserError
from trainer.architectures.auto_model import HeadKind, auto_model
from trainer.architectures.networks import build_network
from trainer.config.sections import ModelConfig, TaskConfig
from trainer.data.facts import SampleFacts
from trainer.data.samples import FILLER
from trainer.tasks.first_batch import ForwardPass
from trainer.tasks.next_tokens import IGNORED_LABEL
from trainer.tasks.task import Outputs, Task

_TARGETS = ("labels", "weights")
"""Columns of a batch that are no input of a model."""


class SupervisedTask(Task):
    """Predicts the labels of rows: texts, images, recordings, or lines of a table.

    A batch has the samples' columns, for texts an ``attention_mask`` int64 [micro, length] that is 0 at padding, and
    ``labels``, which a row at ``FILLER`` has none of.

    Attributes:
        head: head of `transformers` for models by ``model.architecture`` and ``model.pretrained``; None where it has
            none.
    """

    head: HeadKind | None = None

    def __init__(self, settings: TaskConfig, facts: SampleFacts) -> None:
        """Take the settings of the task.

        Args:
            settings: the section ``task``.
            facts: what is known of the samples.
        """
        self._settings = settings
        self._facts = facts
        self._accepted: frozenset[str] | None = None
        self._padding_id: int | None = None
        self._forward_pass = ForwardPass()

    @property
    @abstractmethod
    def num_outputs(self) -> int:
        """Predictions of the model for each sample, or each token."""

    def build_model(self, model_settings: ModelConfig, facts: SampleFacts) -> nn.Module:
        """See Task; with a head for this task, or a built-in network or the user's own with so many outputs."""
        if model_settings.builtin is not None or model_settings.factory is not None:
            model = build_network(model_settings, facts, self.num_outputs)
        elif self.head is None:
            raise UserError(
                f"task.name={self._settings.name} reads tables, which no model of transformers does; set model.builtin "
                "or model.factory in place of "
                f"{'model.architecture' if model_settings.architecture else 'model.pretrained'}."
            )
        else:
            model = auto_model(self.head, model_settings, facts, self.num_outputs)
            self._padding_id = getattr(model.config.get_text_config(), "pad_token_id", None)
        self._accepted = _arguments_of(model)
        return model

    def make_batch(self, samples: Batch, positions: torch.Tensor, training: bool) -> Batch:
        """See Task; columns without anything in them are left out."""
        batch = {name: column for name, column in samples.items() if name != "num_tokens" and column[:1].numel()}
        if "num_tokens" in samples:
            is_token = torch.arange(samples["input_ids"].shape[1]) < samples["num_tokens"][:, None]
            batch = self.padded(batch | {"attention_mask": is_token.long()})
        batch["labels"] = samples["labels"].clone()
        batch["labels"][positions == FILLER] = 0.0 if batch["labels"].is_floating_point() else IGNORED_LABEL
        return batch

    def padded(self, batch: Batch) -> Batch:
        """A batch of texts whose padding is the token by which the model that was built knows it."""
        if self._padding_id is None or "attention_mask" not in batch:
            return batch
        # By which a decoder finds the last token of a text, and which is the model's own to say.
        return batch | {"input_ids": torch.where(batch["attention_mask"] > 0, batch["input_ids"], self._padding_id)}

    def inputs(self, batch: Batch) -> Batch:
        """See Task; all columns but those of targets, of which a model of one's own gets those that it takes."""
        taken = self._accepted
        return {n: column for n, column in batch.items() if n not in _TARGETS and (taken is None or n in taken)}

    def forward(self, model: nn.Module, batch: Batch) -> Outputs:
        """See Task; logits are [micro, outputs], or [micro, length, outputs] where each token has a label."""
        inputs = self.inputs(batch)
        logits = self._forward_pass.logits(model, inputs, _in_words(inputs))
        self._check_shape(logits, batch)
        return Outputs(logits=logits.float())

    def num_tokens(self, batch: Batch) -> int:
        """See Task; tokens of texts without padding, else rows."""
        return int(batch["attention_mask"].sum()) if "attention_mask" in batch else len(batch["labels"])

    def _expected_shape(self, batch: Batch) -> tuple[int, ...]:
        """Shape of the logits."""
        return (len(batch["labels"]), self.num_outputs)

    def _check_shape(self, logits: torch.Tensor, batch: Batch) -> None:
        """Assert that the model predicts what the task asks for, since losses may broadcast without a word."""
        expected = self._expected_shape(batch)
        if tuple(logits.shape) != expected:
            raise UserError(
                f"the model's predictions have shape {list(logits.shape)}, and task.name={self._settings.name} needs "
                f"{list(expected)}; let its last layer have num_outputs={self.num_outputs} outputs."
            )


def _arguments_of(model: nn.Module) -> frozenset[str] | None:
    """Arguments of a model's forward pass; None where it takes any."""
    parameters = inspect.signature(model.forward).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return frozenset(parameter.name for parameter in parameters)


def _in_words(inputs: Batch) -> str:
    """What a model was given, for a sentence."""
    return " and ".join(f"{name} of shape {list(column.shape)}" for name, column in inputs.items())
