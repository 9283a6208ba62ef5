"""Configuration of how a model lies on ranks: parallelism, precision, checkpointed activations, compilation."""

from typing import Annotated, Literal

from pydantic import Field

from sharding.strict_model import OnlyWith, StrictModel

Strategy = Literal["none", "ddp", "zero1", "zero2", "zero3", "hsdp"]
Backend = Literal["torch", "bucketed", "deepspeed", "accelerate"]
Offload = Literal["none", "cpu", "nvme"]
ComputeDtype = Literal["auto", "fp32", "bf16", "fp16", "fp8"]
Float8Recipe = Literal["tensorwise", "rowwise"]

FLOAT8_MULTIPLE = 16
"""Kernels of 8-bit products take multiples of so many values: a layer's inputs and outputs, a micro-batch's tokens."""


class ParallelConfig(StrictModel):
    """How the model's state and the batch are divided over ranks."""

    strategy: Strategy = "zero2"
    """Data-parallel method: `none` (one rank), `ddp`, `zero1`, `zero2`, `zero3`, or `hsdp` (zero3 inside
    groups, replicated across them)."""

    backend: Backend = "torch"
    """What carries out the strategy: `torch` (all strategies), `bucketed` (flat buckets of our own; zero1, zero2,
    zero3, hsdp), `deepspeed` (zero1, zero2, zero3), or `accelerate` (ddp; zero3 on GPUs)."""

    offload_optimizer: Annotated[Offload, OnlyWith(backend="deepspeed")] = "none"
    """Where optimizer state and masters lie: on the device (`none`), in main memory (`cpu`), or in
    files (`nvme`, zero3 alone)."""

    offload_parameters: Annotated[Offload, OnlyWith(backend="deepspeed", strategy="zero3")] = "none"
    """Where parameters lie between uses: on the device (`none`), in main memory (`cpu`), or in
    files (`nvme`)."""

    nvme_path: str | None = None
    """Folder on a local NVMe disk for what is offloaded to `nvme`."""

    replicate: Annotated[int, OnlyWith(strategy="hsdp")] = Field(default=1, ge=1)
    """Number of replicas of the sharded model; ranks / replicate is the shard degree."""

    tensor: int = Field(default=1, ge=1)
    """Tensor-parallel degree in ranks; only 1 is accepted for now."""

    context: int = Field(default=1, ge=1)
    """Context-parallel degree in ranks; only 1 is accepted for now."""

    pipeline: int = Field(default=1, ge=1)
    """Pipeline-parallel degree in ranks; only 1 is accepted for now."""

    expert: int = Field(default=1, ge=1)
    """Expert-parallel degree in ranks; only 1 is accepted for now."""


class PrecisionConfig(StrictModel):
    """Number formats of the forward and backward pass; masters, reduction and optimizer state are always fp32."""

    compute: ComputeDtype = "auto"
    """Format of parameters and activations in computing: `fp32`, `bf16`, `fp16` (with a dynamic loss scale), `fp8`
    (bf16, and linear layers of blocks in 8 bits), or `auto` (bf16 where the device has it natively, else fp32)."""

    fp8_recipe: Annotated[Float8Recipe, OnlyWith(compute="fp8")] = "tensorwise"
    """What has one scale: a whole tensor (faster), or each row (closer to bf16)."""

    initial_loss_scale: Annotated[float, OnlyWith(compute="fp16")] = Field(default=65536.0, ge=1.0)
    """First factor of the loss; it halves after an overflow, whose step all ranks skip."""

    loss_scale_growth_steps: Annotated[int, OnlyWith(compute="fp16")] = Field(default=2000, ge=1)
    """Steps without an overflow after which the loss scale doubles."""


class CompileConfig(StrictModel):
    """torch.compile, applied to each transformer block in place, and to a loss over a vocabulary."""

    enabled: bool = False
    """Compile each block, and the training loss of `causal-lm` and `masked-lm` where no teacher looks at its logits;
    the first step takes longer, later ones are faster."""

    mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = "default"
    """torch.compile's own mode name, for blocks; `reduce-overhead` and `max-autotune`, which replay CUDA graphs, are
    refused until gradients were seen to be right under accumulation on a GPU."""


class ActivationCheckpointingConfig(StrictModel):
    """Which activations are recomputed in the backward pass instead of kept."""

    mode: Literal["none", "full", "every_n", "selective", "budget"] = "none"
    """`none` keeps all; `full` recomputes every block; `every_n` every n-th block; `selective` keeps the results
    of attention and of every second matrix product in each block and recomputes the rest; `budget` has the compiler
    choose what of a block is cheapest to recompute (`compile.enabled` alone)."""

    every_n: Annotated[int, OnlyWith(mode="every_n")] = Field(default=2, ge=1)
    """Recompute one block in this many blocks."""

    memory_budget: Annotated[float, OnlyWith(mode="budget")] = Field(default=0.5, ge=0.0, le=1.0)
    """Share of the activations that a compiled block keeps by itself: 0 keeps its inputs, as `full` does, 1 all."""
