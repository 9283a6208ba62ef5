"""Configuration of the optimizer, and which optimizer a backend can carry; imports no torch."""

from typing import Annotated, Literal

from pydantic import Field

from sharding.config import Backend
from sharding.ranks.errors import UserError
from sharding.strict_model import OnlyWith, StrictModel

OptimizerName = Literal["adamw", "sgd", "muon", "adafactor", "adamw8bit"]


class OptimizerGroupConfig(StrictModel):
    """Settings of the parameters whose names match a pattern."""

    pattern: str
    """Shell pattern (`*`, `?`, `[...]`) for whole parameter names; the first group that matches has the parameter."""

    lr_scale: float = Field(default=1.0, ge=0.0)
    """Factor to the learning rate of these parameters at every step."""

    weight_decay: float | None = Field(default=None, ge=0.0)
    """Decay of all these parameters, vectors among them; null means as without the group."""


class MuonConfig(StrictModel):
    """Muon, for the matrices inside the model's blocks; embeddings, head and vectors have AdamW."""

    momentum: float = Field(default=0.95, ge=0.0, lt=1.0)
    """Weight of the old gradients in the running mean that is made orthogonal."""

    nesterov: bool = True
    """Mix the newest gradient into the mean once more before it is made orthogonal."""

    num_ns_steps: int = Field(default=5, ge=1, le=99)
    """Newton-Schulz iterations, each three matrix products; computed in bf16 on GPUs and in fp32 on CPUs."""

    lr_adjustment: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    """Factor to the rate of an A x B matrix: 0.2 sqrt(max(A, B)), which moves values as far as AdamW would, so that one
    rate suits both; or Keller Jordan's sqrt(max(1, A / B))."""


class AdafactorConfig(StrictModel):
    """Adafactor: second moments of matrices as row and column means; no first moment."""

    beta2_decay: float = Field(default=-0.8, le=0.0)
    """Step t gives its squared gradients the weight t ** beta2_decay in the running means."""

    eps: float = Field(default=2**-23, gt=0.0)
    """Least root of a second moment."""

    min_rms: float = Field(default=1e-3, ge=0.0)
    """The rate is relative to the root mean square of the parameter, or to this where that is smaller."""

    clip_threshold: float = Field(default=1.0, ge=1.0)
    """Largest root mean square of a parameter's update before the rate is applied."""


# Muon leaves to AdamW what is no matrix of a block.
_WITH_ADAMW = OnlyWith(name=("adamw", "adamw8bit", "muon"))


class OptimizerConfig(StrictModel):
    """How gradients become updates."""

    name: OptimizerName = "adamw"
    """`adamw` and `sgd` (torch's fused kernels), `muon`, `adafactor`, or `adamw8bit` (8-bit moments, by torchao)."""

    lr: float = Field(default=1e-3, gt=0.0)
    """Peak learning rate; under `adafactor` at most 1 / sqrt(step), and relative to each parameter's size."""

    weight_decay: float = Field(default=0.1, ge=0.0)
    """Decoupled (L2 under SGD) decay of matrices; vectors such as norms and biases are not decayed."""

    betas: Annotated[tuple[float, float], Field(strict=False), _WITH_ADAMW] = (0.9, 0.95)
    """AdamW's decay rates of the first and second moment."""

    eps: Annotated[float, _WITH_ADAMW] = Field(default=1e-8, gt=0.0)
    """AdamW's term that keeps the denominator from zero."""

    momentum: Annotated[float, OnlyWith(name="sgd")] = Field(default=0.9, ge=0.0, lt=1.0)
    """SGD's momentum; 0 is plain SGD."""

    nesterov: Annotated[bool, OnlyWith(name="sgd")] = False
    """Nesterov's form of SGD momentum."""

    muon: Annotated[MuonConfig, OnlyWith(name="muon")] = MuonConfig()
    """Settings of `muon`."""

    adafactor: Annotated[AdafactorConfig, OnlyWith(name="adafactor")] = AdafactorConfig()
    """Settings of `adafactor`."""

    groups: Annotated[tuple[OptimizerGroupConfig, ...], Field(strict=False)] = ()
    """Parameters with settings of their own, by name; a pattern that no parameter is left for is an error."""

    layer_decay: float = Field(default=1.0, gt=0.0, le=1.0)
    """Factor to the learning rate from each block to the one before it, on top of those of groups: embeddings have the
    lowest rate, and what is behind the last block all of it; 1 means one rate for all."""

    clip_norm: float = Field(default=1.0, ge=0.0)
    """Largest global gradient norm; longer gradients are scaled down to it; 0 means no clipping."""

    ema_decay: Annotated[
        float,
        OnlyWith(
            {"parallel.offload_optimizer": ("none", "cpu")},
            because="the average reads the masters at every step, which nvme keeps in files",
        ),
    ] = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of a moving average of the weights that each step keeps, such as 0.999; 0 means no average."""


def validate_optimizer(config: OptimizerConfig, backend: Backend) -> None:
    """Check that no setting contradicts another, and that the backend can carry the optimizer.

    Raises:
        UserError: one does, or the backend cannot.
    """
    if config.nesterov and config.momentum == 0:
        raise UserError("optimizer.nesterov=true needs optimizer.momentum > 0, but it is 0; set it to 0.9, say.")
    if config.muon.nesterov and config.muon.momentum == 0:
        raise UserError("optimizer.muon.nesterov=true needs optimizer.muon.momentum > 0, but it is 0; set it to 0.95.")
    refusal = refused_optimizer(config.name, backend)
    if refusal is not None:
        raise UserError(
            f"optimizer.name={config.name} does not go with parallel.backend={backend}: {refusal}; "
            "use parallel.backend=torch or optimizer.name=adamw."
        )


def refused_optimizer(name: OptimizerName, backend: Backend) -> str | None:
    """Why a backend cannot carry an optimizer; None where it can."""
    if name in ("adamw", "sgd") or backend not in ("bucketed", "deepspeed"):
        return None
    who = "DeepSpeed" if backend == "deepspeed" else "the bucketed engine"
    return f"{name} works on whole rows of a parameter, but {who} cuts all parameters as one flat vector"
