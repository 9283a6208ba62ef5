"""What a run will hold of memory on each rank, from its configuration and a model on the meta device."""

import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from sharding.blocks import ends_of_language_model, find_blocks, hidden_matrices, layer_weights
from sharding.config import ActivationCheckpointingConfig
from sharding.memory_formula import (
    FrozenBytes,
    Layout,
    ModelSizes,
    StateBytes,
    bucket_elements,
    frozen_bytes,
    state_bytes,
)
from sharding.parallel_dims import ParallelDims
from sharding.precision import compute_dtype
from sharding.state import is_projection
from trainer.config import RunConfig
from trainer.config.optimizer import OptimizerConfig
from trainer.config.rules import accumulation_steps
from trainer.data.facts import SampleFacts
from trainer.model.backward_reach import backward_reach
from trainer.model.models import output_embeddings
from trainer.model.tried_activations import tried_activation_bytes
from trainer.optimizers.prune_choice import keeps_squares, pruned_parameters

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_FP32_BYTES = 4
_NOTHING = FrozenBytes(0.0, 0.0)


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one rank.

    Attributes:
        state: parameters, gradients and optimizer state at their peak.
        activations: what forward keeps for backward, at least; and the logits; 0 where it is not known.
        teacher: of the model that is learnt from.
        is_taught_before: whether that is asked, and gone, before there is a student.
    """

    state: StateBytes
    activations: float
    teacher: FrozenBytes = _NOTHING
    is_taught_before: bool = False

    @property
    def total(self) -> float:
        """Sum of all; kernels, caches and what a micro-batch needs for a moment come on top.

        A teacher runs before the student, which then has no activations yet.
        """
        if self.is_taught_before:
            return max(self.state.total + self.activations, self.teacher.held + self.teacher.gathered)
        return self.state.total + self.teacher.held + max(self.activations, self.teacher.gathered)


@dataclass(frozen=True)
class BlockWidths:
    """Elements per token that a transformer block computes.

    Attributes:
        hidden: width of the residual stream.
        attention: heads x head width.
        key_value: key or value heads x head width.
        feed_forward: width inside the feed-forward layer.
        is_gated: whether that layer has a gate.
    """

    hidden: int
    attention: int
    key_value: int
    feed_forward: int
    is_gated: bool


def estimate_memory(
    config: RunConfig,
    model: nn.Module,
    model_config: "PretrainedConfig | None",
    dims: ParallelDims,
    device: torch.device,
    facts: SampleFacts | None = None,
    teacher: nn.Module | None = None,
) -> MemoryEstimate:
    """A rank's peak by the formulas; activations of what is no language model by a trial on the meta device.

    Args:
        config: the run.
        model: its model, not sharded; it may be on the meta device, and must be to be tried.
        model_config: the model's own configuration; None where it is no model of `transformers`.
        dims: the ranks.
        device: where the run computes.
        facts: of the samples; None for texts.
        teacher: the model that is learnt from; as ``model``.

    Raises:
        UserError: batch sizes do not divide, or the device cannot compute in the configured format.
    """
    sizes, parallel = model_sizes(model), config.parallel
    width = compute_dtype(config.precision, device).itemsize
    layout = Layout(
        strategy=parallel.strategy,
        num_shards=dims.sharding_degree,
        is_bucketed=parallel.backend == "bucketed",
        accumulation_steps=accumulation_steps(config, dims),
        compute_bytes=width,
        moment_bytes=(moment_bytes(config.optimizer, model) + mask_bytes(config, model)) / sizes.num_parameters,
        bucket_elements=bucket_elements(device.type, dims.sharding_degree),
    )
    of_teacher = _NOTHING if teacher is None else frozen_bytes(model_sizes(teacher), layout)
    is_before = config.distill.top_k is not None
    # The formula is of transformers that give logits for each token.
    is_language_model = facts is None or (facts.vocab_size is not None and output_embeddings(model) is not None)
    if model_config is None or not is_language_model:
        tried = 0.0
        if facts is not None and config.activation_checkpointing.mode == "none":
            tried = tried_activation_bytes(model, facts, config.batch.micro_size)
        return MemoryEstimate(state_bytes(sizes, layout), tried * width / _FP32_BYTES, of_teacher, is_before)
    text_config = model_config.get_text_config()
    num_tokens = config.batch.micro_size * config.data.sequence_length
    num_logit_tokens = min(config.task.loss_chunk_tokens or num_tokens, num_tokens)
    activations = activation_bytes(
        block_widths(model, model_config),
        num_blocks=backward_reach(model).num_reached,
        vocabulary=text_config.vocab_size,
        num_tokens=num_tokens,
        num_logit_tokens=num_logit_tokens,
        checkpointing=config.activation_checkpointing,
        compute_bytes=width,
        has_frozen_matrices=any(p.ndim >= 2 and not p.requires_grad for p in model.parameters()),
    )
    if teacher is not None:
        # The teacher's probabilities and the logarithms of the student's; of kept ones the student's softened logits,
        # and these without the kept classes.
        activations += 2 * _FP32_BYTES * num_logit_tokens * text_config.vocab_size
    return MemoryEstimate(state_bytes(sizes, layout), activations, of_teacher, is_before)


def model_sizes(model: nn.Module) -> ModelSizes:
    """Count the elements of a model that is not sharded, trained and frozen; it may be on the meta device."""
    every = list(model.parameters())
    trainable = [p for p in every if p.requires_grad]
    blocks = [list(block.parameters()) for _, block in find_blocks(model)]
    in_blocks = [sum(p.numel() for p in block if p.requires_grad) for block in blocks]
    held = [sum(p.numel() for p in block) for block in blocks]
    uses = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    num_parameters, num_held = sum(p.numel() for p in trainable), sum(p.numel() for p in every)
    embedding, _ = ends_of_language_model(model, [block for _, block in find_blocks(model)])
    looked_up = [] if embedding is None else list(embedding.parameters())
    return ModelSizes(
        num_parameters=num_parameters,
        num_outside_blocks=num_parameters - sum(in_blocks),
        largest_block=max(in_blocks, default=0),
        largest_parameter=max((p.numel() for p in trainable), default=0),
        largest_shared=max((p.numel() for p in trainable if uses[id(p)] > 1), default=0),
        num_frozen=num_held - num_parameters,
        num_frozen_outside_blocks=(num_held - sum(held)) - (num_parameters - sum(in_blocks)),
        largest_gathered_block=max(held, default=0),
        num_embedding=sum(p.numel() for p in looked_up),
        num_trained_embedding=sum(p.numel() for p in looked_up if p.requires_grad),
    )


def moment_bytes(optimizer: OptimizerConfig, model: nn.Module) -> float:
    """Bytes of the whole optimizer state, over all ranks."""
    hidden = hidden_matrices(model)
    return sum(
        _moment_bytes(optimizer, tuple(p.shape), name in hidden)
        for name, p in model.named_parameters()
        if p.requires_grad
    )


def mask_bytes(config: RunConfig, model: nn.Module) -> float:
    """Bytes of the masks of pruned weights, and of means of their squared gradients, over all ranks."""
    if not config.prune.sparsity:
        return 0.0
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    weights = [name for name in layer_weights(model) if not is_projection(name)]
    names = pruned_parameters(config.prune, weights, shapes)
    width = 1 + _FP32_BYTES * keeps_squares(config.prune, config.optimizer.name)
    return float(width * sum(math.prod(shapes[name]) for name in names))


def _moment_bytes(optimizer: OptimizerConfig, shape: tuple[int, ...], is_hidden_matrix: bool) -> float:
    num = math.prod(shape)
    adamw = 2 * _FP32_BYTES * num
    if optimizer.name == "sgd":
        return _FP32_BYTES * num if optimizer.momentum else 0.0
    if optimizer.name == "muon":
        return _FP32_BYTES * num if is_hidden_matrix else adamw
    if optimizer.name == "adafactor":
        # Means of rows and columns.
        return _FP32_BYTES * (num / shape[-1] + num / shape[-2] if len(shape) >= 2 else num)
    if optimizer.name == "adamw8bit":
        from trainer.optimizers.adamw_8bit import quantization_block

        block = quantization_block(shape)
        return adamw if block is None else 2 * (num + _FP32_BYTES * num / block)
    return adamw


def block_widths(model: nn.Module, model_config: "PretrainedConfig") -> BlockWidths:
    """Widths of a model's blocks, from its configuration and the shapes of the first block's matrices."""
    text = model_config.get_text_config()
    hidden, num_heads = text.hidden_size, text.num_attention_heads
    head = getattr(text, "head_dim", None) or hidden // num_heads
    feed_forward = getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None) or 4 * hidden
    blocks = find_blocks(model)
    matrices = [p for p in blocks[0][1].parameters() if p.ndim >= 2] if blocks else []
    return BlockWidths(
        hidden=hidden,
        attention=num_heads * head,
        key_value=(getattr(text, "num_key_value_heads", None) or num_heads) * head,
        feed_forward=feed_forward,
        is_gated=sum(feed_forward in p.shape or 2 * feed_forward in p.shape for p in matrices) != 2,
    )


def activation_bytes(
    widths: BlockWidths,
    *,
    num_blocks: int,
    vocabulary: int,
    num_tokens: int,
    num_logit_tokens: int,
    checkpointing: ActivationCheckpointingConfig,
    compute_bytes: int,
    has_frozen_matrices: bool = False,
) -> float:
    """The least that a micro-batch adds to a rank's memory: operands that backward needs, and the logits.

    Counted as in Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models" (2022), section 4,
    for attention that keeps no scores and without dropout: the inputs of every matrix product, of norms and of
    attention, and its result; what a gate and an activation function multiply. The logits are kept as computed and in
    fp32, with their gradient in fp32.

    Args:
        widths: of a block.
        num_blocks: how many backward goes through: what is before all that is trained keeps nothing.
        vocabulary: logits per token.
        num_tokens: tokens in a micro-batch.
        num_logit_tokens: those whose logits exist at once.
        checkpointing: what is recomputed.
        compute_bytes: bytes of an element of an activation.
        has_frozen_matrices: whether some matrices are frozen, for which the inputs of products need not be kept.
    """
    attention = 2 * widths.hidden + 2 * widths.attention + 2 * widths.key_value
    feed_forward = 2 * widths.hidden + (4 if widths.is_gated else 2) * widths.feed_forward
    whole = attention + feed_forward
    if has_frozen_matrices:
        # Of norms their results, and of the feed-forward layer what its last matrix multiplies.
        whole -= 2 * widths.hidden + widths.feed_forward
    if num_blocks == 0:
        whole = 0
    kept: float
    if checkpointing.mode == "full":
        kept = num_blocks * widths.hidden + whole
    elif checkpointing.mode == "every_n":
        num_recomputed = -(-num_blocks // checkpointing.every_n)
        kept = num_recomputed * widths.hidden + (num_blocks - num_recomputed) * whole
    elif checkpointing.mode == "selective":
        # The block's input, attention's result, and every second product's.
        products = 2 * widths.hidden + widths.attention + 2 * widths.key_value
        products += (2 if widths.is_gated else 1) * widths.feed_forward
        kept = num_blocks * (widths.hidden + widths.attention + products // 2) + whole
    elif checkpointing.mode == "budget":
        # Of each block its input and a share of the rest, and all of the one that is recomputed.
        share = checkpointing.memory_budget
        kept = num_blocks * (widths.hidden + share * (whole - widths.hidden)) + (1 - share) * (whole - widths.hidden)
    else:
        kept = num_blocks * whole
    return num_tokens * compute_bytes * kept + num_logit_tokens * (compute_bytes + 2 * _FP32_BYTES) * vocabulary
