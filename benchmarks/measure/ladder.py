"""The ladder of ``shardline bench throughput``: one technique a rung, from nothing to all of them. Imports no torch."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

from benchmarks.measure.sizes import Size
from sharding.ranks.errors import UserError
from trainer.config import RunConfig, load_config
from trainer.config.earlier_spellings import with_present_spelling
from trainer.config.rules import World, validate
from trainer.config.short_runs import UNJUDGED, beginning_of_schedule
from trainer.config.yaml_files import read_yaml_mapping

_ACCUMULATION_STEPS = 2
_LOG_EVERY_STEPS = 10


@dataclass(frozen=True)
class Machine:
    """What decides whether a technique can run.

    Attributes:
        num_ranks: ranks.
        has_gpu: whether they compute on GPUs.
        has_bf16: whether ``precision.compute=auto`` chooses bf16.
        fp8_recipes: values of ``precision.fp8_recipe`` that it has products for.
        tokenizer_size: tokens of the tokenizer's vocabulary, which the model has where it names no size of its own.
    """

    num_ranks: int
    has_gpu: bool
    has_bf16: bool
    fp8_recipes: Collection[str]
    tokenizer_size: int


@dataclass(frozen=True)
class Rung:
    """One technique.

    Attributes:
        name: in the table.
        overrides: what turns it on.
        is_kept: whether the rungs above have it too; else it is measured on what is there so far, and left again.
        has_synthetic_tokens: whether the loader's place is taken by one batch that is there already.
        keeps_freed_memory: whether the heap keeps what is freed, which no setting decides.
        why_not: a reason why it cannot run, empty where it can.
    """

    name: str
    overrides: tuple[str, ...] = ()
    is_kept: bool = True
    has_synthetic_tokens: bool = False
    keeps_freed_memory: bool = False
    why_not: Callable[[Machine, RunConfig], str] = lambda _machine, _config: ""


def _needs_gpu(machine: Machine, _config: RunConfig) -> str:
    return "" if machine.has_gpu else "the kernels that it chooses among need a GPU"


def _needs_cpu(machine: Machine, _config: RunConfig) -> str:
    return "a GPU's tensors are not in the heap" if machine.has_gpu else ""


def _needs_bf16(machine: Machine, _config: RunConfig) -> str:
    return "" if machine.has_bf16 else "this device has no native bf16, which precision.compute=auto would choose"


def _needs_buckets(machine: Machine, config: RunConfig) -> str:
    if config.parallel.backend not in ("torch", "bucketed"):
        return f"parallel.backend={config.parallel.backend} has no exchange but its own"
    return "" if machine.num_ranks > 1 else "one rank has nobody to exchange buckets with"


def _needs_odd_vocabulary(machine: Machine, config: RunConfig) -> str:
    size = config.model.config.get("vocab_size", machine.tokenizer_size)
    return "" if size % _VOCABULARY_MULTIPLE else f"the vocabulary of {size} is a multiple of it already"


def _needs_fp8(recipe: str) -> Callable[[Machine, RunConfig], str]:
    def why_not(machine: Machine, config: RunConfig) -> str:
        if recipe not in machine.fp8_recipes:
            return "this device has no such products in 8 bits"
        if config.model.architecture == "gpt2":
            return "GPT-2 of transformers has no linear layers"
        return _needs_torchao(machine, config)

    return why_not


def _needs_torchao(_machine: Machine, _config: RunConfig) -> str:
    return "" if find_spec("torchao") else "torchao is not installed"


_VOCABULARY_MULTIPLE = 128
_CHUNK_TOKENS = 512

BEGINNING = (
    "model.attention=eager",
    "precision.compute=fp32",
    "precision.fp8_recipe=tensorwise",
    "compile.enabled=false",
    "activation_checkpointing.mode=none",
    "model.vocab_multiple=0",
)
"""What every rung starts from, whether the lowest one is measured, fails, or is left out."""

LADDER = (
    Rung("eager attention, fp32"),
    Rung("+ freed memory kept", keeps_freed_memory=True, why_not=_needs_cpu),
    Rung("+ SDPA attention", ("model.attention=sdpa",)),
    Rung("+ bf16", ("precision.compute=bf16",), why_not=_needs_bf16),
    Rung(
        "+ padded vocabulary",
        (f"model.vocab_multiple={_VOCABULARY_MULTIPLE}",),
        why_not=_needs_odd_vocabulary,
    ),
    Rung("+ compiled blocks", ("compile.enabled=true",)),
    Rung("+ bucketed engine", ("parallel.backend=bucketed",), why_not=_needs_buckets),
    Rung("fp8 products", ("precision.compute=fp8",), is_kept=False, why_not=_needs_fp8("tensorwise")),
    Rung(
        "fp8 products, a scale a row",
        ("precision.compute=fp8", "precision.fp8_recipe=rowwise"),
        is_kept=False,
        why_not=_needs_fp8("rowwise"),
    ),
    Rung("autotuned kernels", ("compile.mode=max-autotune-no-cudagraphs",), is_kept=False, why_not=_needs_gpu),
    Rung("selective checkpointing", ("activation_checkpointing.mode=selective",), is_kept=False),
    Rung("full checkpointing", ("activation_checkpointing.mode=full",), is_kept=False),
    Rung("loss in chunks", (f"task.loss_chunk_tokens={_CHUNK_TOKENS}",), is_kept=False),
    Rung("8-bit moments", ("optimizer.name=adamw8bit",), is_kept=False, why_not=_needs_torchao),
    Rung("synthetic tokens", is_kept=False, has_synthetic_tokens=True),
)
"""From bottom to top. The optimizer is fused on every rung: Shardline has no other."""


def rung_config(
    rung: Rung, size: Size, kept: Sequence[str], overrides: Sequence[str], machine: Machine, num_steps: int
) -> RunConfig:
    """The run of one rung.

    Args:
        rung: which.
        size: the model.
        kept: what the rungs below have turned on.
        overrides: the user's changes, of nothing that a rung decides.
        machine: where it runs.
        num_steps: steps that are needed.

    Raises:
        UserError: the technique does not fit the others, the machine, or the user's changes; it says why.
    """
    fixed = [
        "name=throughput",
        f"steps={num_steps}",
        "tokens=null",
        "epochs=null",
        *beginning_of_schedule(load_config(size.config, size.overrides), num_steps, total_steps=100_000),
        f"metrics.every_steps={_LOG_EVERY_STEPS}",
        *UNJUDGED,
        "checkpoint.every_steps=0",
        "checkpoint.keep_every=0",
        "tracking.wandb.mode=disabled",
        *(["parallel.strategy=none"] if machine.num_ranks == 1 else []),
    ]
    given = with_present_spelling(read_yaml_mapping(size.config)).get("parallel")
    # Buckets are a rung of their own; a file of another library's is on that library on every rung.
    if isinstance(given, dict) and given.get("backend") == "bucketed":
        fixed.append("parallel.backend=torch")
    below = [*size.overrides, *fixed, *BEGINNING, *kept, *overrides]
    reason = rung.why_not(machine, load_config(size.config, below))
    if reason:
        raise UserError(reason)
    config = load_config(size.config, [*below, *rung.overrides])
    if not size.has_own_batch and not any(override.startswith("batch.global_size=") for override in overrides):
        global_size = config.batch.micro_size * _ACCUMULATION_STEPS * machine.num_ranks
        config = config.model_copy(update={"batch": config.batch.model_copy(update={"global_size": global_size})})
    validate(config, World(machine.num_ranks, machine.has_gpu))
    return config
