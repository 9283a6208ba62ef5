"""The rungs of the two sizes that ``python -m benchmarks.device`` measures. Imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.measure.sizes import SIZES, Size


@dataclass(frozen=True)
class DeviceRung:
    """One technique, on top of those that stay.

    Attributes:
        name: in the table; one that begins with + stays for the rungs after it, where it is faster.
        overrides: what turns it on.
        attention_kernel: the one kernel of scaled dot product attention that may be chosen: ``cudnn``, ``flash`` or
            ``fa3``; empty leaves the choice to torch.
        has_tf32: whether fp32 products are in TF32, which no setting decides.
        is_on_best: whether it is measured on the fastest so far; else on ``BEGINNING`` alone.
        on_cpu: whether the small form has it.
        micro_batches: of a step.
        cost_s: what it takes on a GPU, roughly, compilation included; it is not begun with less time left.
    """

    name: str
    overrides: tuple[str, ...] = ()
    attention_kernel: str = ""
    has_tf32: bool = False
    is_on_best: bool = True
    on_cpu: bool = True
    micro_batches: int = 2
    cost_s: float = 15.0

    @property
    def is_kept(self) -> bool:
        """Whether it stays."""
        return self.name.startswith("+")


BEGINNING = (
    "parallel.strategy=zero2",
    "precision.compute=bf16",
    "compile.enabled=false",
    "activation_checkpointing.mode=none",
    "schedule.total_steps=100000",
    "metrics.every_steps=10",
)
"""Beneath every rung. ZeRO-2 on one rank computes as it does on many: gathered parameters in bf16, fp32 reduction."""

LLAMA_RUNGS = (
    DeviceRung("+ bf16", cost_s=20),
    DeviceRung("+ compiled blocks", ("compile.enabled=true",), cost_s=60),
    DeviceRung(
        "+ micro-batch of 16, loss in chunks of 4096",
        ("batch.micro_size=16", "task.loss_chunk_tokens=4096"),
        on_cpu=False,
        cost_s=45,
    ),
    DeviceRung("fp8", ("precision.compute=fp8",), on_cpu=False, cost_s=50),
    DeviceRung("attention by cuDNN", attention_kernel="cudnn", on_cpu=False, cost_s=25),
    DeviceRung("attention by flash", attention_kernel="flash", on_cpu=False, cost_s=25),
    DeviceRung("attention by FA3", attention_kernel="fa3", on_cpu=False, cost_s=25),
    DeviceRung(
        "fp32 with TF32",
        ("precision.compute=fp32", "batch.micro_size=4", "batch.global_size=8"),
        has_tf32=True,
        is_on_best=False,
        cost_s=15,
    ),
    DeviceRung("16 micro-batches a step", micro_batches=16, cost_s=70),
)

GPT2_RUNGS = (
    DeviceRung("+ bf16", cost_s=15),
    DeviceRung("+ padded vocabulary", ("model.vocab_multiple=128",), cost_s=15),
    DeviceRung("+ compiled blocks", ("compile.enabled=true",), on_cpu=False, cost_s=35),
    DeviceRung("+ micro-batch of 64", ("batch.micro_size=64",), on_cpu=False, cost_s=30),
)

RUNGS: dict[str, Sequence[DeviceRung]] = {"llama-1b": LLAMA_RUNGS, "gpt2-124m": GPT2_RUNGS}
"""By size, in order."""


def measured_size(name: str, *, has_gpu: bool) -> Size:
    """The size itself on a GPU; elsewhere the same architecture so small that a rung takes a moment."""
    if has_gpu:
        return SIZES[name]
    if name == "llama-1b":
        return SIZES["tiny"]
    small = ("n_embd=64", "n_layer=2", "n_head=2", "n_positions=32", "vocab_size=513")
    overrides = (*(f"model.config.{text}" for text in small), "data.sequence_length=32", "batch.micro_size=2")
    return Size(SIZES[name].config, (*SIZES[name].overrides, *overrides))
