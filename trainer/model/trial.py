"""A model tried without memory: whether it can be built and computed, before anything long is done for it."""

import logging
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from sharding.batch_norm import refuse_batch_norm
from sharding.blocks import refuse_scattered_layers
from sharding.parallel_dims import ParallelDims
from sharding.ranks.errors import UserError
from trainer.architectures.config import build_model_config
from trainer.config import RunConfig
from trainer.config.sections import ModelConfig
from trainer.data.facts import SampleFacts
from trainer.model.lora import add_adapters
from trainer.model.models import build_model_on_meta, transformers_config
from trainer.model.quantization_aware import make_aware
from trainer.model.refusals import refuse_encoder, refuse_positions_by_padding, refuse_settings
from trainer.optimizers.layer_decay import depth_scales
from trainer.tasks.causal_lm import CausalLanguageModelling, predicts_next_tokens
from trainer.tasks.masked_lm import MaskedLanguageModelling
from trainer.tasks.task import Task

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_FIELDS = ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size", "hidden_act")
_TRIAL_TOKENS = 8
# What torch says of sizes that do not fit; what else a model without values cannot do is none of the user's mistakes.
_SIZES = re.compile(
    r"must match the size|shape '.*' is invalid|shapes cannot be multiplied|not divisible|must be divisible"
    r"|should be broadcastable to"
)


@dataclass(frozen=True)
class TriedModel:
    """A model without memory that can be computed.

    Attributes:
        model: with its adapters, if it has some.
        model_config: its configuration; None where it is no model of `transformers`.
        adapters: which layers have adapters, for people.
        scales: what multiplies the learning rate, by parameter; empty where nothing does.
    """

    model: nn.Module
    model_config: "PretrainedConfig | None"
    adapters: str
    scales: dict[str, float]


def try_model(config: RunConfig, task: Task, facts: SampleFacts, dims: ParallelDims) -> TriedModel:
    """Build a run's model without memory, and compute the shapes of a short sequence with it.

    Args:
        config: the run; of stages the one with the longest sequences.
        task: its task.
        facts: of its samples.
        dims: of the ranks that are to be started.

    Raises:
        UserError: it cannot be built or computed, or does not go with the run's other settings.
    """
    is_named = (config.model.architecture or config.model.pretrained) is not None
    model_config = build_model_config(config.model, facts) if is_named else None
    if model_config is not None:
        refuse_settings(config, task, model_config, dims)
    try:
        model = build_model_on_meta(task, config.model, facts)
        model_config = transformers_config(model, config.model, facts)
        if model_config is not None:
            refuse_positions_by_padding(config, model, model_config)
            if predicts_next_tokens(task):
                refuse_encoder(config, model_config)
        adapters = add_adapters(model, config.model)
        make_aware(model, config.model)
        scales = depth_scales(model, config.optimizer.layer_decay)
        refuse_batch_norm(model, config.activation_checkpointing)
        if dims.reduction_degree > 1:
            refuse_scattered_layers(model, config.parallel.strategy)
        _try_forward(task, config.model, facts)
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 - each of some hundred models fails in its own way
        raise _refusal(config, model_config, error) from None
    return TriedModel(model, model_config, adapters, scales)


def _try_forward(task: Task, settings: ModelConfig, facts: SampleFacts) -> None:
    """Have the model compute the shapes of a short sequence, without values."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    if not isinstance(task, CausalLanguageModelling | MaskedLanguageModelling):
        # What a task of the user's own feeds to its model is its own matter.
        return
    level = logging.getLogger("torch").level
    # It logs, as errors, what it cannot do without values.
    logging.getLogger("torch").setLevel(logging.CRITICAL)
    try:
        with FakeTensorMode(), torch.device("cpu"), torch.no_grad():
            tokens = torch.zeros(1, min(_TRIAL_TOKENS, facts.sequence_length or 1), dtype=torch.long)
            without_cache = {"use_cache": False} if isinstance(task, CausalLanguageModelling) else {}
            task.build_model(settings, facts)(input_ids=tokens, **without_cache)
    except Exception as error:
        if _SIZES.search(str(error)):
            raise
    finally:
        logging.getLogger("torch").setLevel(level)


def _refusal(config: RunConfig, model_config: "PretrainedConfig | None", error: Exception) -> UserError:
    reason = next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), "")
    if model_config is None:
        return UserError(
            f"the model {config.model.name} cannot be built or computed ({type(error).__name__}: {reason}); change its "
            "settings or its code."
        )
    settings = f"model.pretrained={config.model.pretrained}" if config.model.pretrained else "model.config"
    text_config = model_config.get_text_config()
    sizes = [f"{name}={getattr(text_config, name)}" for name in _FIELDS if getattr(text_config, name, None) is not None]
    return UserError(
        f"{settings} describes a {model_config.model_type} that cannot be computed ({type(error).__name__}: "
        f"{reason}): {', '.join(sizes)}; change what does not fit."
    )
