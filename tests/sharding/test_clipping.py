"""Clipping inside the optimizer: a gradient is divided once, by what its own step found, whoever else looks at it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

from sharding.engine import Batch, Engine
from sharding.ranks.process_group import Ranks
from tests.sharding.engine_cases import FACTS, random_batch, tiny_config, tiny_engine
from tests.support import TINY_MODEL, run_on_ranks
from trainer.architectures.config import build_model_config
from trainer.parity.cases import write_parameters
from trainer.parity.optimizers import plain_optimizer

_LR = 0.1
# With rows that can be quantised.
_MODEL = TINY_MODEL | {"config": TINY_MODEL["config"] | {"hidden_size": 96, "num_hidden_layers": 1}}
_OPTIMIZERS = ("sgd", "adamw", "muon", "adafactor", "adamw8bit")
# By what the summed loss of each step is divided: the first is clipped hard, the second not at all, the third a little.
_DENOMINATORS = (1, 10_000, 100)
_ENGINES = (
    ("torch", "zero2"),
    ("bucketed", "zero1"),
    ("bucketed", "zero2"),
    ("bucketed", "zero3"),
    ("accelerate", "ddp"),
)

Parameters = dict[str, torch.Tensor]


def _engine(ranks: Ranks, strategy: str, optimizer: str = "sgd", backend: str = "torch", **sections: Any) -> Engine:
    return tiny_engine(ranks, strategy, backend=backend, model=_MODEL, optimizer=_settings(optimizer), **sections)


def _settings(optimizer: str) -> dict[str, Any]:
    return {"name": optimizer, "weight_decay": 0.0} | ({"momentum": 0.5} if optimizer == "sgd" else {})


def _batches(step: int) -> list[Batch]:
    return [random_batch(10 * step + index) for index in range(2)]


def _backward(engine: Engine, step: int) -> None:
    engine.train_batch(_batches(step), _DENOMINATORS[step])


def _train(engine: Engine) -> None:
    for step in range(len(_DENOMINATORS)):
        _backward(engine, step)
        engine.clip_grad_norm(1.0)
        engine.step(_LR)


def _state(engine: Engine, *, with_optimizer: bool = True) -> Parameters:
    return {part.name: part.tensor.clone() for part in engine.state(with_optimizer=with_optimizer)}


def _assert_equal(found: Engine, expected: Engine, case: object) -> None:
    states = _state(found), _state(expected)
    assert states[0].keys() == states[1].keys(), case
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), (case, name)


def _clip_once(model: nn.Module) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)


def _clip_twice(model: nn.Module) -> None:
    """Multiply by the same factor twice."""
    norm = float(nn.utils.clip_grad_norm_(model.parameters(), 1.0))
    for parameter in model.parameters():
        assert parameter.grad is not None
        parameter.grad.div_(max(norm, 1.0))


def _train_plainly(initial: Parameters, name: str, clip: Callable[[nn.Module], None]) -> Parameters:
    from transformers import AutoModelForCausalLM

    config = tiny_config({}, model=_MODEL, optimizer=_settings(name))
    model = AutoModelForCausalLM.from_config(build_model_config(config.model, FACTS))
    model.load_state_dict(initial, strict=False)
    model.tie_weights()
    optimizer = plain_optimizer(model, config.optimizer, name, _LR)
    for step, denominator in enumerate(_DENOMINATORS):
        for batch in _batches(step):
            logits = model(batch["input_ids"]).logits.flatten(0, 1)
            loss = functional.cross_entropy(logits, batch["labels"].flatten(), reduction="sum")
            # Each of two ranks has these batches.
            (2 * loss / denominator).backward()
        clip(model)
        optimizer.step()
        optimizer.zero_grad()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def _distance(found: Parameters, expected: Parameters, initial: Parameters) -> float:
    """How far parameters are apart, as a share of how far they have come."""
    apart = torch.cat([(found[name] - tensor).flatten() for name, tensor in expected.items()])
    moved = torch.cat([(initial[name] - tensor).flatten() for name, tensor in expected.items()])
    return float(apart.norm() / moved.norm())


def _check_against_plain(ranks: Ranks, root: Path) -> None:
    plain: dict[str, Parameters] = {}
    for backend, strategy, name in (
        *(("torch", "ddp", name) for name in _OPTIMIZERS),
        *((backend, strategy, "sgd") for backend, strategy in _ENGINES),
    ):
        engine = _engine(ranks, strategy, name, backend)
        write_parameters(engine, ranks, root / "initial")
        _train(engine)
        write_parameters(engine, ranks, root / "final")
        if ranks.rank:
            continue
        initial, final = load_file(root / "initial"), load_file(root / "final")
        if name not in plain:
            plain[name] = _train_plainly(initial, name, _clip_once)
            for wrong in (_clip_twice, lambda _: None):
                assert _distance(final, _train_plainly(initial, name, wrong), initial) > 0.1, name
        assert _distance(final, plain[name], initial) < 1e-3, (backend, strategy, name)


@pytest.mark.timeout(300)
def test_every_optimizer_and_engine_clips_as_a_plain_loop(tmp_path: Path) -> None:
    run_on_ranks(_check_against_plain, 2, tmp_path, timeout_s=240)


def _check_looking(ranks: Ranks, layout: tuple[str, str], name: str, **sections: Any) -> None:
    """Whoever looks sees what the optimizer gets, and changes nothing by it."""
    looked_at, other = (_engine(ranks, layout[1], name, layout[0], **sections) for _ in range(2))
    for step in range(len(_DENOMINATORS)):
        _backward(looked_at, step)
        before = {key: gradient.clone() for key, gradient in looked_at.named_local_gradients().items()}
        norm = looked_at.clip_grad_norm(1.0)
        divisor = (norm + 1e-6).clamp(min=1.0)
        for _ in range(2):
            for key, gradient in looked_at.named_local_gradients().items():
                assert torch.equal(gradient, before[key] / divisor), (layout, name, key)
        # The norm of clipped gradients.
        assert float(looked_at.clip_grad_norm(0.0)) == pytest.approx(min(float(norm), 1.0), rel=1e-5), (layout, name)
        _backward(other, step)
        assert torch.equal(other.clip_grad_norm(1.0), norm), (layout, name)
        looked_at.step(_LR)
        other.step(_LR)
    _assert_equal(looked_at, other, (layout, name))


def _check_masks(ranks: Ranks, layout: tuple[str, str], name: str) -> None:
    engine = _engine(ranks, layout[1], name, layout[0])
    for shard in engine.named_local_shards().values():
        shard[: len(shard) // 2] = 0.0
    for step in range(len(_DENOMINATORS)):
        _backward(engine, step)
        for gradient in engine.named_local_gradients().values():
            gradient[: len(gradient) // 2] = 0.0
        engine.clip_grad_norm(1.0)
        engine.step(_LR)
    for key, shard in engine.named_local_shards().items():
        assert not shard[: len(shard) // 2].any(), (layout, name, key)
        assert shard[len(shard) // 2 :].any() or not shard.numel(), (layout, name, key)


def _check_skipped(ranks: Ranks, layout: tuple[str, str]) -> None:
    """Neither a verdict nor a factor outlives its step, nor is a step without one taken blindly."""
    skipping, other = (_engine(ranks, layout[1], "sgd", layout[0]) for _ in range(2))
    for engine in (skipping, other):
        _backward(engine, 0)
        engine.clip_grad_norm(1.0)
        assert engine.step(_LR) == 1.0
    for clips in (True, False):
        _backward(skipping, 0)
        for gradient in skipping.named_local_gradients().values():
            gradient.fill_(torch.nan)
        if clips:
            assert skipping.clip_grad_norm(1.0).isnan(), layout
        assert skipping.step(_LR) == 0.0, layout
    # Given up, as samples of a spike are; and state is made for what has none, which must not learn of it.
    _backward(skipping, 0)
    skipping.clip_grad_norm(1e-3)
    skipping.drop_gradients()
    skipping.state(with_optimizer=True)
    for engine in (skipping, other):
        _backward(engine, 2)
    other.clip_grad_norm(0.0)
    assert skipping.step(_LR) == other.step(_LR) == 1.0
    _assert_equal(skipping, other, layout)


def _check_scaled(ranks: Ranks, layout: tuple[str, str]) -> None:
    """Under fp16 the loss scale goes with the clipping, and alone where nothing is clipped."""
    for max_norm in (1.0, 0.0, None):
        moved = []
        for precision in ({"compute": "fp32"}, {"compute": "fp16", "initial_loss_scale": 4096.0}):
            engine = _engine(ranks, layout[1], "sgd", layout[0], precision=precision)
            before = _state(engine, with_optimizer=False)
            _backward(engine, 2)
            if max_norm is not None:
                engine.clip_grad_norm(max_norm)
            assert engine.step(_LR) == 1.0, (layout, max_norm)
            after = _state(engine, with_optimizer=False)
            moved.append(torch.cat([(after[key] - before[key]).flatten() for key in before]))
        assert float((moved[1] - moved[0]).norm() / moved[0].norm()) < 0.02, (layout, max_norm)


class _Undivided(torch.optim.Optimizer):
    """An optimizer that knows nothing of factors."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        assert self.grad_scale is None
        for parameter in self.param_groups[0]["params"]:
            parameter.sub_(parameter.grad, alpha=self.param_groups[0]["lr"])


def _check_undivided(ranks: Ranks, layout: tuple[str, str]) -> None:
    engine = _engine(ranks, layout[1], "sgd", layout[0])
    shards = engine.named_local_shards()
    engine._optimizer = _Undivided([part.tensor for part in engine._optimized], {"lr": _LR})  # type: ignore[attr-defined]
    before = {key: shard.clone() for key, shard in shards.items()}
    _backward(engine, 0)
    gradients = {key: gradient.clone() for key, gradient in engine.named_local_gradients().items()}
    norm = engine.clip_grad_norm(1.0)
    assert norm > 1.0
    engine.step(_LR)
    for key, gradient in gradients.items():
        assert torch.allclose(before[key] - shards[key], _LR * gradient / norm, atol=1e-7), (layout, key)


def _check_states(ranks: Ranks) -> None:
    for layout in (("torch", "ddp"), ("torch", "zero2"), ("bucketed", "zero2")):
        for name in ("sgd", "adamw"):
            _check_looking(ranks, layout, name)
            _check_masks(ranks, layout, name)
        _check_looking(ranks, layout, "sgd", precision={"compute": "fp16", "initial_loss_scale": 4096.0})
        _check_skipped(ranks, layout)
        _check_scaled(ranks, layout)
        _check_undivided(ranks, layout)
    _check_looking(ranks, ("torch", "zero2"), "muon")


@pytest.mark.timeout(300)
def test_a_factor_is_applied_once_and_forgotten() -> None:
    run_on_ranks(_check_states, 2, timeout_s=240)
