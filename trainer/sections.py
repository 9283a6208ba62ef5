"""Configuration sections of the step: task, model, batch, schedule, evaluation, metrics, launch, faults."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from sharding.strict_model import StrictModel


class TaskConfig(StrictModel):
    """What the model is trained to do."""

    name: str = "causal-lm"
    """`causal-lm`, or `module:Class` for a task of your own, from `folder` or from what is installed."""

    folder: str | None = None
    """Folder of the module of a task of your own; where it is not given, that of the configuration file if the module
    lies there. The working folder is none: what lies there is not run."""

    z_loss: float = Field(default=0.0, ge=0.0)
    """Coefficient of log^2 Z, added to each token's training loss under `causal-lm`; 1e-4 is usual, 0 means none."""

    loss_chunk_tokens: int = Field(default=0, ge=0)
    """Positions whose logits exist at once under `causal-lm`; saves memory, 0 makes all of a micro-batch's."""


class ModelConfig(StrictModel):
    """Which model is trained, from scratch or from pretrained weights."""

    architecture: str | None = None
    """Model type as `transformers` names it (`llama`, `gpt2`, `qwen3` ...), trained from scratch."""

    config: dict[str, Any] = {}
    """Fields of that architecture's `transformers` configuration; `vocab_size` defaults to the tokenizer's."""

    pretrained: str | None = None
    """Folder or hub name of a model whose configuration and weights the run starts from."""

    trust_remote_code: bool = False
    """Run Python code that a `pretrained` model brings along with its weights; false refuses such a model."""

    vocab_multiple: int = Field(default=0, ge=0)
    """Round a from-scratch model's vocabulary up to a multiple of this many tokens; 0 and 1 leave it as it is."""

    attention: Literal["sdpa", "eager", "flex_attention", "flash_attention_2"] = "sdpa"
    """Attention implementation of `transformers`."""


class BatchConfig(StrictModel):
    """Sequences per optimizer step; accumulation steps = global_size / (micro_size x data-parallel ranks)."""

    global_size: int = Field(default=16, ge=1)
    """Sequences in one optimizer step, over all ranks and micro-batches."""

    micro_size: int = Field(default=4, ge=1)
    """Sequences in one forward and backward pass of one rank."""


class ScheduleConfig(StrictModel):
    """Learning rate over steps: linear warm-up, then the named curve."""

    name: Literal["constant", "linear", "cosine", "wsd", "polynomial", "inverse_sqrt", "exponential", "step"] = "cosine"
    """Curve after warm-up; `wsd` is warm-up, stable, linear decay; the last three and `constant` have no end."""

    warmup_steps: int = Field(default=0, ge=0)
    """Steps over which the rate rises linearly to its peak."""

    total_steps: int = Field(default=0, ge=0)
    """Step at which a curve with an end ends; 0 means the number of steps the run was first started with."""

    decay_steps: int = Field(default=0, ge=0)
    """Length in steps of the final decay under `wsd`; 0 means a tenth of total_steps."""

    final_lr_ratio: float = Field(default=0.1, ge=0.0, le=1.0)
    """Lowest rate after warm-up, as a share of the peak: where a curve ends, or what one without an end stops at."""

    power: float = Field(default=1.0, gt=0.0)
    """Exponent of the `polynomial` curve in the share of steps that remains."""

    decay_rate: float = Field(default=0.5, gt=0.0, lt=1.0)
    """Factor of each decay under `exponential` and `step`."""

    decay_every_steps: int = Field(default=0, ge=0)
    """Steps after warm-up in which the rate falls by decay_rate, smoothly (`exponential`) or at their end (`step`)."""

    milestones: Annotated[tuple[int, ...], Field(strict=False)] = ()
    """Steps after which the rate falls by decay_rate under `step`, in place of decay_every_steps."""


class EvaluationConfig(StrictModel):
    """Loss on the held-out split."""

    every_steps: int = Field(default=0, ge=0)
    """Evaluate after every this many steps; 0 means only at the end of the run."""

    max_sequences: int = Field(default=0, ge=0)
    """Evaluate on only the first this many sequences; 0 means the whole validation split."""


class MetricsConfig(StrictModel):
    """What is measured and how often it is written."""

    every_steps: int = Field(default=10, ge=0)
    """Write a line of metrics after every this many steps; 0 means only at the end."""

    profile_steps: int = Field(default=0, ge=0)
    """Steps to record with torch's profiler, from the fourth step of this attempt; 0 means none."""

    gradient_noise_scale: bool = False
    """Estimate the gradient noise scale (critical batch size, in tokens) at every every_steps-th step."""

    parameter_hash: bool = True
    """Log a hash of the initial parameters, equal for any number of ranks and any strategy."""

    system: bool = True
    """Log how busy each node's processors, memory and GPUs are, in percent, as `system/node-N/...`."""


class LaunchConfig(StrictModel):
    """How ranks are started on this machine."""

    nproc_per_node: int = Field(default=0, ge=0)
    """Ranks per node; 0 means one per GPU, or 2 where there is none (1 under strategy `none`)."""

    threads_per_rank: int = Field(default=0, ge=0)
    """CPU threads of one rank's operators; 0 divides the usable cores by the ranks of a node."""

    master_port: int = Field(default=0, ge=0, le=65535)
    """TCP port of the rendezvous; 0 takes a free one."""

    init_timeout_s: float = Field(default=600.0, gt=0.0)
    """Seconds that ranks wait for one another at start-up and until the first step is done."""

    step_timeout_s: float = Field(default=600.0, gt=0.0)
    """Seconds that a collective may take after the first step."""

    preflight: bool = False
    """Examine machines, devices, links and the run's folder before each attempt, as `shardline doctor --quick` does;
    what fails ends the run with the machine's name."""


class FaultsConfig(StrictModel):
    """What the run does when something goes wrong."""

    max_nonfinite_steps: int = Field(default=5, ge=1)
    """Consecutive steps with a non-finite loss or gradient, each skipped by all ranks, before the run stops: at the
    next line of metrics, and at most 20 steps later; under fp16 the steps that it takes to halve the loss scale down to
    1 come on top."""

    max_restarts: int = Field(default=0, ge=0)
    """Times that `shardline run`, or a job of `slurm/`, starts the ranks again after a failure, from the last
    checkpoint, without restart_refill_steps of progress in between; the same failure three times in a row at the same
    step ends it before that. 0 leaves it to whoever started the run."""

    restart_backoff_s: float = Field(default=1.0, ge=0.0)
    """Seconds before the first restart; each further one waits twice as long, up to 300."""

    restart_refill_steps: int = Field(default=1000, ge=0)
    """Steps beyond those of all earlier attempts after which the restarts so far no longer count, neither for
    max_restarts nor for the wait; 0 has all of them count."""

    verify_data: bool = True
    """Compare each block of a prepared corpus with its SHA-256 when it is first read; one that differs ends the run."""

    replica_check_every_steps: int = Field(default=0, ge=0)
    """Compare the parameters that ranks hold alike (ddp, hsdp, zero1 and zero2 of deepspeed and bucketed) after every
    this many steps and before each checkpoint; 0 means never."""

    straggler_ratio: float = Field(default=1.5, ge=0.0)
    """Name a rank, in `events.jsonl` and on the console, that makes steps this many times longer for three log
    intervals in a row; 0 names none."""

    watchdog: bool = True
    """End the run when a rank hangs, and say which one, where, and what the others waited for."""

    watchdog_factor: float = Field(default=10.0, gt=1.0)
    """A rank hangs when a phase of its step lasts this many times longer than the median of the latest 64 did, and
    twice as long as the longest of them."""

    watchdog_min_s: float = Field(default=120.0, gt=0.0)
    """Seconds that a phase may last in any case; `launch.init_timeout_s` is the limit of start-up, the first step and,
    at the least, of loading and saving."""

    # YAML takes a bare off for false.
    spike_policy: Annotated[
        Literal["off", "warn", "skip", "rollback"],
        BeforeValidator(lambda value: "off" if value is False else value),
    ] = "warn"
    """What is done about a step whose loss or gradient norm is far above that of the steps before it: `warn` says so,
    `skip` takes the step again with the samples that follow, `rollback` returns to the checkpoint before it and leaves
    its samples out. `skip` waits for the device once a step."""

    spike_threshold: float = Field(default=6.0, gt=0.0)
    """Distance above the median of the recent steps from which a value is a spike, in robust standard deviations."""

    spike_window_steps: int = Field(default=128, ge=2)
    """Recent steps that a step is compared with."""

    spike_warmup_steps: int = Field(default=64, ge=2)
    """Steps that a run takes before any is judged; at most spike_window_steps."""

    max_consecutive_skips: int = Field(default=5, ge=1)
    """Batches in a row that `skip` may leave out before the run stops."""

    rollback_skip_steps: int = Field(default=1, ge=1)
    """Steps whose samples `rollback` leaves out: the one that spiked and those just before it; the checkpoint that it
    returns to is from before them all."""

    max_rollbacks: int = Field(default=10, ge=1)
    """Rollbacks in a run before the next spike stops it."""
