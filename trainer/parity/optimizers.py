"""The plain side's optimizers: torch's own on whole parameters, sharing nothing with ``trainer.optimizers``."""

from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from trainer.config.optimizer import OptimizerConfig


def plain_optimizer(model: nn.Module, settings: OptimizerConfig, name: str, lr: float) -> Any:
    """An object with ``step`` and ``zero_grad`` that does to a plain model what the named optimizer should."""
    by_depth = _factors_by_depth(model, settings.layer_decay)
    groups = [
        _plain_group(parameter_name, p, settings, lr * by_depth[parameter_name])
        for parameter_name, p in model.named_parameters()
    ]
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=settings.momentum, nesterov=settings.nesterov)
    if name == "adafactor":
        factors = settings.adafactor
        return torch.optim.Adafactor(
            groups,
            lr=lr,
            beta2_decay=factors.beta2_decay,
            eps=(factors.eps, factors.min_rms),
            d=factors.clip_threshold,
        )
    if name == "muon":
        return _PlainMuon(model, groups, settings)
    if name == "adamw8bit":
        return _PlainAdamW8bit(model, groups, settings)
    return torch.optim.AdamW(groups, lr=lr, betas=settings.betas, eps=settings.eps)


def _plain_group(name: str, parameter: nn.Parameter, settings: OptimizerConfig, lr: float) -> dict[str, Any]:
    """A group of one parameter."""
    group = {"params": [parameter], "lr": lr, "weight_decay": settings.weight_decay if parameter.ndim >= 2 else 0.0}
    for override in reversed(settings.groups):
        if fnmatchcase(name, override.pattern):
            group["lr"] = lr * override.lr_scale
            decay = settings.weight_decay if parameter.ndim >= 2 else 0.0
            group["weight_decay"] = decay if override.weight_decay is None else override.weight_decay
    return group


def _factors_by_depth(model: nn.Module, decay: float) -> dict[str, float]:
    """Factor to the rate of each parameter: one step of decay for each layer between it and the end."""
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    # A list within a layer, of experts say, is part of the layer.
    names = [f"{name}.{i}." for name, m in lists for i in range(len(m)) if next(m[i].parameters(), None) is not None]
    layers = [name for name in names if not any(name != other and name.startswith(other) for other in names)]
    tables = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    factors, num_passed = {}, 0
    for name, _ in model.named_parameters():
        layer = next((index for index, prefix in enumerate(layers) if name.startswith(prefix)), None)
        num_passed = num_passed if layer is None else layer + 1
        steps_to_go = len(layers) - (num_passed if layer is None else layer)
        is_first = num_passed == 0 or name in tables
        factors[name] = decay ** (len(layers) + 1 if layer is None and is_first else steps_to_go)
    return factors


class _PlainMuon:
    """Muon written down as it is published, in fp32 (torch's works in bf16), for the matrices in a list of layers."""

    def __init__(self, model: nn.Module, groups: list[dict[str, Any]], settings: OptimizerConfig) -> None:
        embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
        inside = {id(p) for layers in lists for p in layers.parameters() if p.ndim == 2 and id(p) not in embeddings}
        self._groups = [group for group in groups if id(group["params"][0]) in inside]
        rest = [group for group in groups if id(group["params"][0]) not in inside]
        self._adamw = torch.optim.AdamW(rest, betas=settings.betas, eps=settings.eps)
        self._momenta = [torch.zeros_like(group["params"][0]) for group in self._groups]
        self._settings = settings.muon
        self.zero_grad: Callable[[], None] = model.zero_grad

    @torch.no_grad()
    def step(self) -> None:
        """One step."""
        self._adamw.step()
        weight = self._settings.momentum
        for group, momentum in zip(self._groups, self._momenta, strict=True):
            matrix = group["params"][0]
            if matrix.grad is None:
                continue
            momentum += (1 - weight) * (matrix.grad - momentum)
            update = matrix.grad + weight * (momentum - matrix.grad) if self._settings.nesterov else momentum
            update = update / update.norm()
            for _ in range(self._settings.num_ns_steps):
                gram = update @ update.T
                update = 3.4445 * update + (-4.7750 * gram + 2.0315 * gram @ gram) @ update
            num_rows, num_columns = matrix.shape
            factor = 0.2 * max(num_rows, num_columns) ** 0.5
            if self._settings.lr_adjustment == "original":
                factor = max(1.0, num_rows / num_columns) ** 0.5
            matrix -= group["lr"] * (group["weight_decay"] * matrix + factor * update)


class _PlainAdamW8bit:
    """Torchao's own step and state for what is quantised, blocks by the rule of ``trainer.optimizers.adamw_8bit``."""

    def __init__(self, model: nn.Module, groups: list[dict[str, Any]], settings: OptimizerConfig) -> None:
        from torchao.optim.subclass_8bit import OptimState8bit

        from trainer.optimizers.adamw_8bit import quantization_block

        self._betas, self._eps = settings.betas, settings.eps
        self._moments: list[tuple[dict[str, Any], torch.Tensor, torch.Tensor]] = []
        rest = []
        for group in groups:
            shape = tuple(group["params"][0].shape)
            block = quantization_block(shape)
            if block is None:
                rest.append(group)
            else:
                mean, square = (OptimState8bit.zeros(shape, signed=s, block_size=block) for s in (True, False))
                self._moments.append((group, mean, square))
        self._adamw = torch.optim.AdamW(rest, betas=settings.betas, eps=settings.eps)
        self._step = torch.zeros(())
        self.zero_grad: Callable[[], None] = model.zero_grad

    @torch.no_grad()
    def step(self) -> None:
        """One step."""
        from torchao.optim.adam import single_param_adam

        self._adamw.step()
        self._step += 1
        for group, mean, square in self._moments:
            (parameter,) = group["params"]
            if parameter.grad is None:
                continue
            single_param_adam(
                parameter.detach(),
                parameter.grad,
                self._step,
                mean,
                square,
                None,
                torch.tensor(group["lr"]),
                *self._betas,
                group["weight_decay"],
                self._eps,
                IS_ADAMW=True,
                BF16_STOCHASTIC_ROUND=False,
            )
