"""Configuration sections of the step: task, model, batch, evaluation, metrics, launch."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from sharding.strict_model import SET, UNSET, Like, OnlyWith, StrictModel
from trainer.config.data import SourceConfig
from trainer.config.rows import TASK_SAMPLES

_OWN_TASK = OnlyWith(name=Like("*:*", "module:Class"))
_HF = OnlyWith(builtin=UNSET, factory=UNSET, because="it is a setting of transformers")

_CLASSIFICATION = OnlyWith(name=tuple(task for task in TASK_SAMPLES if task.endswith("classification")))
_OF_ROWS = OnlyWith(name=tuple(task for task, (samples, _) in TASK_SAMPLES.items() if samples == "rows"))

Weight = Annotated[float, Field(gt=0.0)]
# One may stand without a list.
Targets = Annotated[
    tuple[str, ...],
    BeforeValidator(lambda targets: (targets,) if isinstance(targets, str) else targets),
    Field(strict=False, min_length=1),
]


class TaskConfig(StrictModel):
    """What the model is trained to do."""

    name: str = "causal-lm"
    """`causal-lm`, `masked-lm`, `classification` (of tables), `sequence-classification` and `token-classification` (of
    texts), `image-classification`, `audio-classification`, `regression`, or `module:Class` for a task of your own, from
    `folder` or from what is installed."""

    folder: Annotated[str | None, _OWN_TASK] = None
    """Folder of the module of a task of your own; where it is not given, that of the configuration file if the module
    lies there. The working folder is none: what lies there is not run."""

    options: Annotated[dict[str, Any], _OWN_TASK] = {}
    """Settings of a task of your own, free in form: its class gets them as the argument `options`."""

    z_loss: Annotated[float, OnlyWith(name="causal-lm")] = Field(default=0.0, ge=0.0)
    """Coefficient of log^2 Z, added to each token's training loss; 1e-4 is usual, 0 means none."""

    loss_chunk_tokens: Annotated[
        int,
        OnlyWith(name="causal-lm"),
        OnlyWith(
            {"precision.compute": ("auto", "fp32", "bf16", "fp8")},
            because="chunks have made their gradients before fp16 can scale the loss, and small ones would be lost",
        ),
    ] = Field(default=0, ge=0)
    """Positions whose logits exist at once; saves memory, 0 makes all of a micro-batch's."""

    mask_probability: Annotated[float, OnlyWith(name="masked-lm")] = Field(default=0.15, gt=0.0, lt=1.0)
    """Share of tokens that are to be predicted: of these 80 % are masked, 10 % are another token."""

    whole_word: Annotated[bool, OnlyWith(name="masked-lm")] = False
    """Choose whole words and not tokens, so that no part of a word tells the others."""

    loss: Annotated[Literal["auto", "cross-entropy", "binary-cross-entropy", "mse", "huber"], _OF_ROWS] = "auto"
    """Training loss. A classification has `cross-entropy` (`auto`), or between two classes
    `binary-cross-entropy`, for which the model has one output, the log odds of the second; a regression has the squared
    error `mse` (`auto`) or `huber`."""

    label_smoothing: Annotated[float, _CLASSIFICATION] = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of each target that is spread over all classes in training; 0.1 is usual, 0 means none."""

    class_weights: Annotated[
        Annotated[tuple[Weight, ...], Field(strict=False)] | Literal["balanced"] | None, _CLASSIFICATION
    ] = None
    """Factor of each class's loss in training, in the order of the classes, or `balanced`: inverse to the number of its
    training rows. The summed loss is divided by the number of targets, not by the sum of their weights."""

    huber_delta: Annotated[float, OnlyWith(loss="huber")] = Field(default=1.0, gt=0.0)
    """Error up to which it is squared, and beyond which it grows linearly, in standard deviations of the training
    labels."""


ALL_LINEAR = "all-linear"
"""As a target of LoRA: every linear layer of the body."""


class LoraConfig(StrictModel):
    """Low-rank adapters (LoRA) beside frozen linear layers, W + alpha / rank x B A: A, B and a new head are trained."""

    rank: Annotated[
        int,
        OnlyWith(
            {"precision.compute": ("auto", "fp32", "bf16", "fp16")},
            because="adapters are too narrow to be rounded to 8 bits",
        ),
        OnlyWith(
            {"parallel.offload_parameters": ("none", "cpu")},
            because="checkpoints read frozen parameters from memory, and nvme keeps them in files",
        ),
    ] = Field(default=0, ge=0)
    """Rows of A and columns of B; 8 to 64 are usual, 0 means no adapters."""

    alpha: Annotated[float | None, OnlyWith(rank=SET)] = Field(default=None, gt=0.0)
    """The adapters' output is multiplied by alpha / rank; null means twice the rank."""

    dropout: Annotated[float, OnlyWith(rank=SET)] = Field(default=0.0, ge=0.0, lt=1.0)
    """Probability that an element of an adapter's input is set to 0 in training."""

    targets: Annotated[Targets, OnlyWith(rank=SET)] = (ALL_LINEAR,)
    """Linear layers that get adapters, by their name, whole or from a dot on (`q_proj`), or by a shell pattern for the
    whole name (`*.layers.0.*`); `all-linear` are all but those of the head."""

    @property
    def alpha_or_default(self) -> float:
        """Alpha, as a whole number where it is one, as other programs expect it."""
        alpha = 2 * self.rank if self.alpha is None else self.alpha
        return int(alpha) if alpha == int(alpha) else alpha

    @property
    def scale(self) -> float:
        """What the adapters' output is multiplied by."""
        return self.alpha_or_default / self.rank


class ModelConfig(StrictModel):
    """Which model is trained: exactly one of architecture, pretrained, builtin and factory says it."""

    architecture: str | None = None
    """Model type as `transformers` names it (`llama`, `gpt2`, `qwen3` ...), trained from scratch."""

    config: Annotated[dict[str, Any], OnlyWith(pretrained=UNSET, because="a pretrained model has its own"), _HF] = {}
    """Fields of that architecture's `transformers` configuration; `vocab_size` defaults to the tokenizer's."""

    pretrained: str | None = None
    """Folder or hub name of a model whose configuration and weights the run starts from."""

    builtin: Literal["mlp", "cnn", "lstm", "embedding-mlp"] | None = None
    """A small network that comes along, trained from scratch, one prediction a sample; docs/training.md has them."""

    factory: str | None = None
    """`module:function` that makes an `nn.Module` of your own; it is called with `facts` (what is known of the
    samples), `num_outputs` (predictions of a sample, null where the task has no such number) and the arguments."""

    arguments: Annotated[dict[str, Any], OnlyWith(architecture=UNSET, pretrained=UNSET)] = {}
    """Arguments of the built-in network, or of the function that factory names."""

    folder: Annotated[str | None, OnlyWith(factory=SET)] = None
    """Folder of the module of a factory; where it is not given, that of the configuration file if the module lies
    there."""

    new_head: bool = False
    """Initialise what stored weights lack of the model or have in another shape, if it is no part of its body: for
    another task, or other classes, on the weights of `pretrained`, or of `checkpoint.from` with `load: weights`."""

    freeze: Annotated[
        tuple[str, ...],
        Field(strict=False),
        OnlyWith(
            {"parallel.offload_parameters": ("none", "cpu")},
            because="checkpoints read frozen parameters from memory, and nvme keeps them in files",
        ),
        OnlyWith({"model.lora.rank": UNSET}, because="adapters leave all else frozen"),
    ] = ()
    """Shell patterns (`*`, `?`, `[...]`) for whole names of parameters that keep their first values: they have neither
    gradients nor optimizer state. A pattern that matches no parameter is an error."""

    lora: Annotated[LoraConfig, _HF] = LoraConfig()
    """Low-rank adapters, trained in place of the weights of `pretrained`, or of `checkpoint.from`."""

    quantize_aware: Annotated[
        Literal["int4-weight"] | None,
        OnlyWith({"parallel.backend": ("torch", "bucketed")}, because="it was not proven with others"),
        OnlyWith({"precision.compute": ("auto", "fp32", "bf16", "fp16")}, because="fp8 rounds weights by itself"),
        OnlyWith({"compile.enabled": False}, because="it was not proven with compiled blocks"),
        OnlyWith({"task.loss_chunk_tokens": UNSET}, because="that computes the output projection by itself"),
        OnlyWith({"model.lora.rank": UNSET}, because="the weights beside adapters are not trained"),
    ] = None
    """Compute each product of a linear layer with its weights as `shardline quantize --method int4-weight` will round
    them, in training and evaluation, and let gradients through, so that training makes up for it. Checkpoints and
    exports have the weights before rounding."""

    resize_vocabulary: Annotated[
        bool,
        OnlyWith(pretrained=SET),
        OnlyWith({"model.lora.rank": UNSET}, because="adapters leave the new rows as they are, which must be trained"),
    ] = False
    """Let the tokenizer have more tokens than the pretrained model: a new token's embedding, and its row of the output
    projection, begin as the mean of those that are there."""

    trust_remote_code: Annotated[bool, OnlyWith(pretrained=SET)] = False
    """Run Python code that a `pretrained` model brings along with its weights; false refuses such a model."""

    vocab_multiple: Annotated[int, OnlyWith(pretrained=UNSET, because="a pretrained model has its vocabulary"), _HF] = (
        Field(default=0, ge=0)
    )
    """Round a from-scratch model's vocabulary up to a multiple of this many tokens; 0 and 1 leave it as it is."""

    attention: Annotated[Literal["sdpa", "eager", "flex_attention", "flash_attention_2"], _HF] = "sdpa"
    """Attention implementation of `transformers`."""

    @property
    def name(self) -> str:
        """What the model is called in logs and sentences."""
        return str(self.architecture or self.pretrained or self.builtin or self.factory)


class BatchConfig(StrictModel):
    """Samples per optimizer step; accumulation steps = global_size / (micro_size x data-parallel ranks)."""

    global_size: int = Field(default=16, ge=1)
    """Samples in one optimizer step, over all ranks and micro-batches."""

    micro_size: int = Field(default=4, ge=1)
    """Samples in one forward and backward pass of one rank."""


class EvaluationSet(SourceConfig):
    """Data of its own to evaluate on: where it comes from, with the settings of a source, and what it is called."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the set: its loss is `eval/NAME/loss`; letters, digits, `.`, `_` and `-`."""


class EvaluationConfig(StrictModel):
    """Metrics of the held-out split, and whether training ends where they no longer improve."""

    every_steps: int = Field(default=0, ge=0)
    """Evaluate after every this many steps; 0 means only at the end of the run."""

    max_sequences: int = Field(default=0, ge=0)
    """Evaluate on only this many samples, of each set: the first, of a mixture or of rows at equal distances; 0 means
    all of them."""

    sets: Annotated[
        tuple[EvaluationSet, ...],
        Field(strict=False),
        OnlyWith({"data.streaming": False}, because="a stream's tokenizer may be trained on another beginning later"),
    ] = ()
    """Further data to evaluate on, none of which is trained on; each has its metrics under its name."""

    by_source: Annotated[bool, OnlyWith({"data.mixture": SET})] = False
    """Evaluate also on what is held out of each source of a mixture alone: `eval/SOURCE/loss`; takes as long again."""

    monitor: str = "loss"
    """Metric of the evaluation, without `eval/`, that patience, `checkpoint.keep_best`, reports and `shardline list`
    judge by; the task says which direction of it is better."""

    @property
    def is_monitored(self) -> bool:
        """Whether a metric was named that there must be."""
        return bool(self.patience) or self.monitor != type(self).model_fields["monitor"].default

    patience: Annotated[int, OnlyWith(every_steps=SET, because="0 evaluates at the end alone")] = Field(default=0, ge=0)
    """Finish the run after this many evaluations in a row without an improvement of the monitored metric; 0 means
    never."""

    min_delta: Annotated[float, OnlyWith(patience=SET)] = Field(default=0.0, ge=0.0)
    """Improvements that are not larger than this do not count as such."""


class MetricsConfig(StrictModel):
    """What is measured and how often it is written."""

    every_steps: int = Field(default=10, ge=0)
    """Write a line of metrics after every this many steps; 0 means only at the end."""

    profile_steps: int = Field(default=0, ge=0)
    """Steps to record with torch's profiler, from the fourth step of this attempt; 0 means none."""

    gradient_noise_scale: Annotated[
        bool,
        OnlyWith(every_steps=SET),
        OnlyWith(
            {"parallel.backend": ("torch", "bucketed", "accelerate")},
            because="the estimate needs each micro-batch's own gradient, which deepspeed does not show",
        ),
    ] = False
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
