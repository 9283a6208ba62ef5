"""Models on the meta device, their size and arithmetic per token."""

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sharding.blocks import find_blocks, layer_weights
from sharding.float8 import is_fit
from sharding.ranks.errors import UserError
from trainer.architectures.config import build_model_config, field
from trainer.architectures.faults import faults_of_a_configuration, is_raised_by_transformers, reason
from trainer.config.sections import ModelConfig
from trainer.data.facts import SampleFacts
from trainer.model.backward_reach import backward_reach
from trainer.model.freezing import check_trained, freeze_parameters
from trainer.model.new_head import body_of
from trainer.tasks.task import Task

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class ModelFacts:
    """Size of a model and its arithmetic.

    Attributes:
        num_parameters: all parameters, shared ones once.
        num_matrix_parameters: parameters used in matrix products: an untied input embedding is left out, a tied
            one counts as the output projection. Experts that a token does not visit are counted too.
        num_layers: number of blocks.
        attention_width: heads x head width.
        num_block_linears: linear layers of blocks.
        num_float8_linears: those of them that ``precision.compute=fp8`` multiplies in 8 bits.
        is_per_token: whether arithmetic per token is known: every matrix is used once for each token of a text.
        body: names of the tensors that belong to no head.
        layer_weights: names of the trained matrices and kernels of layers, no embeddings, in the model's order.
        notes: what the weights are that the model begins with, and which of them are trained, a line each; none
            where there is nothing to say.
        num_frozen: parameters that are not trained.
        num_frozen_matrix_parameters: those of ``num_matrix_parameters`` that are not.
        num_matrix_parameters_before: those of ``num_matrix_parameters`` that lie before all that is trained.
        num_layers_before: blocks that do.
    """

    num_parameters: int
    num_matrix_parameters: int
    num_layers: int
    attention_width: int
    num_block_linears: int
    num_float8_linears: int
    is_per_token: bool = True
    body: frozenset[str] = frozenset()
    layer_weights: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    num_frozen: int = 0
    num_frozen_matrix_parameters: int = 0
    num_matrix_parameters_before: int = 0
    num_layers_before: int = 0

    def flops_per_token(self, sequence_length: int, *, causal: bool) -> int:
        """Forward and backward floating-point operations per token: 6N + 12Lds, or 6N + 6Lds discounting the mask.

        A matrix of n parameters takes 2n forward, 2n for the gradient of its input, and 2n for its own; attention takes
        4ds forward and 8ds backward in each of L layers. Not computed, and so not counted: the gradients of frozen
        matrices, and of any input before all that is trained. With N_trained and, behind its first block, N_back and
        L_back this is 2N + 2 N_back + 2 N_trained + 4Lds + 8 L_back ds.

        It says nothing unless ``is_per_token``. Source: Chowdhery et al., "PaLM" (2022), appendix B; the causal
        convention halves the attention term. What backward leaves out: Hu et al., "LoRA" (2021), section 4.2.
        """
        num = self.num_matrix_parameters
        products = 6 * num - 2 * (self.num_frozen_matrix_parameters + self.num_matrix_parameters_before)
        passes = (12 * self.num_layers - 8 * self.num_layers_before) // (2 if causal else 1)
        return products + passes * self.attention_width * sequence_length


def build_model_on_meta(task: Task, settings: ModelConfig, facts: SampleFacts) -> nn.Module:
    """The task's model with parameters and buffers that have no memory yet, those that are frozen without gradients.

    Raises:
        UserError: the model does not accept the configuration, ``model.freeze`` does not fit it, or nothing is trained.
    """
    try:
        with torch.device("meta"):
            model = _wholly_on_meta(task.build_model(settings, facts))
    except faults_of_a_configuration() as error:
        is_blamed = isinstance(error, ImportError | ValueError) or is_raised_by_transformers(error)
        if not is_blamed or (settings.architecture or settings.pretrained) is None:
            raise
        raise _not_built(settings, error) from None
    freeze_parameters(model, settings.freeze)
    check_trained(model, settings.freeze)
    return model


def _wholly_on_meta(model: nn.Module) -> nn.Module:
    """The model without what its constructor has drawn all the same: ``torch.Tensor(n)`` heeds no default device.

    Those values would be others on every rank; now they come from the model's initialisation, or their lack is seen.
    """
    drawn = {id(p): p for p in model.parameters() if not p.is_meta}
    replaced = {key: nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for key, p in drawn.items()}
    for module in model.modules() if drawn else ():
        for name, parameter in module._parameters.items():
            if id(parameter) in replaced:
                module._parameters[name] = replaced[id(parameter)]
    return model


def _not_built(settings: ModelConfig, error: Exception) -> UserError:
    kind, attention = settings.architecture or settings.pretrained, settings.attention
    if "attention implementation" in str(error) and attention != "eager":
        # transformers names a setting of its own.
        return UserError(f"a {kind} does not have model.attention={attention}; set model.attention=eager.")
    return UserError(
        f"a {kind} with model.attention={attention} cannot be built: {reason(error)}; set other fields of "
        "model.config, or choose another model.architecture."
    )


def transformers_config(model: nn.Module, settings: ModelConfig, facts: SampleFacts) -> "PretrainedConfig | None":
    """The configuration of `transformers` that a model has, or that its settings name; None where there is none.

    Args:
        model: what the task has built.
        settings: the section ``model``.
        facts: of the samples.

    Raises:
        UserError: see ``build_model_config``.
    """
    is_named = (settings.architecture or settings.pretrained) is not None
    # To load it takes seconds, which a small network should not cost.
    if not is_named and "transformers" not in sys.modules:
        return None
    from transformers import PreTrainedModel

    if isinstance(model, PreTrainedModel):
        return model.config
    return build_model_config(settings, facts) if is_named else None


def model_facts(model: nn.Module, model_config: "PretrainedConfig | None", *, reads_tokens: bool = True) -> ModelFacts:
    """Count a model's parameters; it may be on the meta device, but must not be sharded yet.

    Args:
        model: the model.
        model_config: its configuration; None where it is no model of `transformers`.
        reads_tokens: whether samples are texts.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    output = output_embeddings(model)
    if output is not None:
        embeddings.discard(id(output.weight))
    parameters = list(model.parameters())
    matrices = [p for p in parameters if p.ndim >= 2 and id(p) not in embeddings]
    blocks, reach = find_blocks(model), backward_reach(model)
    before = {id(p) for _, block in blocks[: reach.first] for p in block.parameters()}
    if blocks and reach.first == len(blocks):
        # Of what comes after the blocks backward needs its own gradients alone.
        before = {id(p) for p in parameters}
    text_config = None if model_config is None else model_config.get_text_config()
    named_layers = None if text_config is None else field(text_config, "num_hidden_layers")
    in_blocks = [module for _, block in blocks for module in block.modules()]
    return ModelFacts(
        num_parameters=sum(p.numel() for p in parameters),
        num_matrix_parameters=sum(p.numel() for p in matrices),
        num_layers=named_layers or len(blocks),
        attention_width=0 if text_config is None else _attention_width(text_config),
        num_block_linears=sum(isinstance(module, nn.Linear) for module in in_blocks),
        num_float8_linears=sum(map(is_fit, in_blocks)),
        is_per_token=text_config is not None and reads_tokens,
        body=body_of(model),
        layer_weights=layer_weights(model),
        num_frozen=sum(p.numel() for p in parameters if not p.requires_grad),
        num_frozen_matrix_parameters=sum(p.numel() for p in matrices if not p.requires_grad),
        num_matrix_parameters_before=sum(p.numel() for p in matrices if id(p) in before),
        num_layers_before=(named_layers or len(blocks)) * reach.first // max(len(blocks), 1),
    )


def output_embeddings(model: nn.Module) -> Any:
    """The output projection of a model that says which it is; some of transformers raise where they have none."""
    try:
        return getattr(model, "get_output_embeddings", lambda: None)()
    except (AttributeError, NotImplementedError):
        return None


def _attention_width(config: "PretrainedConfig") -> int:
    """Heads x head width, the mean over layers where they differ; 0 where the configuration names no heads."""
    is_heterogeneous = getattr(config, "is_heterogeneous", False)
    widths = []
    for layer in config.per_layer_config if is_heterogeneous else [config]:
        num_heads = field(layer, "num_attention_heads") or 0
        head_width = field(layer, "head_dim") or (field(layer, "hidden_size") or 0) // max(num_heads, 1)
        widths.append(num_heads * head_width)
    return sum(widths) // len(widths)
