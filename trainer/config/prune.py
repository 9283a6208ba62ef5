"""Configuration of pruning, and how much is pruned after which step; imports no torch."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from sharding.strict_model import SET, UNSET, OnlyWith, StrictModel

PruneBy = Literal["magnitude", "gradient", "importance", "random"]
BY_GRADIENTS = ("gradient", "importance")
PrunePattern = Literal["unstructured", "2:4"]
PruneScope = Literal["global", "layer"]

_WHERE_PRUNED = OnlyWith(sparsity=SET)

# One may stand without a list.
Patterns = Annotated[
    tuple[str, ...],
    BeforeValidator(lambda patterns: (patterns,) if isinstance(patterns, str) else patterns),
    Field(strict=False),
]


class PruneConfig(StrictModel):
    """Weights that become zero during training, and stay so."""

    sparsity: Annotated[
        float,
        OnlyWith(
            {"parallel.backend": ("torch", "bucketed", "accelerate")},
            because="DeepSpeed does not show the gradients that pruned weights must not have",
        ),
        OnlyWith({"model.lora.rank": UNSET}, because="adapters train beside weights that stay as they are"),
        OnlyWith(
            {"metrics.gradient_noise_scale": UNSET}, because="that measures gradients before those of pruned weights go"
        ),
    ] = Field(default=0.0, ge=0.0, le=1.0)
    """Share of the weights that is pruned in the end, such as 0.5; 0 prunes none."""

    by: Annotated[PruneBy, _WHERE_PRUNED] = "magnitude"
    """Which weights go first: those of the smallest `magnitude`; of the smallest mean squared `gradient` of the global
    batch, which is hardly better than chance; of the smallest `importance`, that mean times the squared weight; or
    `random` ones, which is chance. The mean is AdamW's own second moment, and else an exponential one of its own that
    keeps 0.99 at each step."""

    pattern: Annotated[PrunePattern, _WHERE_PRUNED] = "unstructured"
    """`unstructured`, or `2:4`: of each four neighbours in a row two, which GPUs multiply faster; sparsity is 0.5."""

    scope: Annotated[PruneScope, _WHERE_PRUNED, OnlyWith(pattern="unstructured")] = "global"
    """`global` compares all weights with one another; `layer` prunes the same share of each parameter."""

    parameters: Annotated[Patterns, _WHERE_PRUNED] = ()
    """Shell patterns (`*`, `?`, `[...]`) for names of the parameters that are pruned; if there are none, all trained
    matrices and kernels but embeddings."""

    exclude: Annotated[Patterns, _WHERE_PRUNED] = ()
    """Shell patterns for names of parameters that are not."""

    begin: Annotated[int, _WHERE_PRUNED] = Field(default=0, ge=0)
    """Step after which sparsity begins to grow from 0; 0 is before the first step."""

    end: Annotated[int, _WHERE_PRUNED] = Field(default=0, ge=0)
    """Step after which `sparsity` is reached, all at once where it is `begin`; patience counts from here."""

    every: Annotated[int, _WHERE_PRUNED] = Field(default=100, ge=1)
    """Steps from one choice of weights to the next, from `begin` to `end`; sparsity grows along Zhu and Gupta's
    cubic."""

    keep_masks: bool = True
    """Weights that the checkpoint has pruned with which a run begins (`checkpoint.from`) stay zero; false trains them
    again."""


def sparsity_after(config: PruneConfig, step: int) -> float | None:
    """The share of weights that is pruned from the end of a step on; None where a step changes nothing.

    Zhu and Gupta, "To prune, or not to prune: exploring the efficacy of pruning for model compression" (2017), equation
    1, from sparsity 0.
    """
    if not config.sparsity or step > config.end or step < config.begin:
        return None
    if step == config.end:
        return config.sparsity
    if step == config.begin or (step - config.begin) % config.every:
        return None
    left = (config.end - step) / (config.end - config.begin)
    return config.sparsity * (1.0 - left**3)
