"""Batch normalisation under every engine: what one process makes of micro-batches of all ranks' rows together."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

from sharding.batch_norm import RUNNING_STATISTICS, SynchronizedBatchNorm, refuse_batch_norm
from sharding.config import ActivationCheckpointingConfig
from sharding.engine import Batch, Engine
from sharding.ranks.errors import UserError
from sharding.ranks.object_exchange import gather_objects, sum_over_ranks
from sharding.ranks.process_group import Ranks
from tests.sharding.engine_cases import ON_2_RANKS
from tests.sharding.network_cases import (
    IMAGES,
    TABLE,
    network_config,
    network_engine,
    random_rows,
    split_rows,
)
from tests.support import run_on_ranks
from trainer.architectures.networks import build_network
from trainer.config.sections import ModelConfig
from trainer.optimizers.weight_average import WeightAverage
from trainer.parity.cases import write_parameters

_CNN = {"channels": [4, 5], "hidden_sizes": [7], "batch_norm": True, "activation": "prelu"}
_MLP = {"hidden_sizes": [8, 7], "batch_norm": True}
_NUM_STEPS = 3
_LR = 0.1
# Rows of each rank, of one micro-batch after the other.
_EVEN = ((4, 4), (4, 4))
_RAGGED = ((40, 25), (64, 0))


def _batches(facts: Any, step: int, sizes: tuple[tuple[int, ...], ...]) -> list[Batch]:
    return [random_rows(facts, sum(rows), 10 * step + index) for index, rows in enumerate(sizes)]


def _engine(ranks: Ranks, builtin: str, backend: str, strategy: str, **sections: Any) -> Engine:
    arguments, facts = (_CNN, IMAGES) if builtin == "cnn" else (_MLP, TABLE)
    parallel = {"strategy": strategy, "backend": backend, "replicate": 2 if strategy == "hsdp" else 1}
    return network_engine(network_config(builtin, arguments, parallel, **sections), facts, ranks)


def _train(engine: Engine, ranks: Ranks, facts: Any, sizes: tuple[tuple[int, ...], ...]) -> list[float]:
    """Train on this rank's rows; returns the mean losses of all ranks' rows."""
    losses = []
    for step in range(_NUM_STEPS):
        whole = _batches(facts, step, sizes)
        own = [split_rows(batch, rows)[ranks.rank] for batch, rows in zip(whole, sizes, strict=True)]
        num_rows = sum(map(sum, sizes))
        loss = engine.train_batch(own, num_rows)
        engine.clip_grad_norm(0.0)
        engine.step(_LR)
        losses.append(sum_over_ranks(loss[None], ranks)[0] / num_rows)
    return losses


def _statistics(engine: Engine) -> dict[str, torch.Tensor]:
    parts = engine.state(with_optimizer=False)
    return {part.name: part.tensor.clone() for part in parts if part.name.endswith((*RUNNING_STATISTICS, "_tracked"))}


def _check_alike(engine: Engine, ranks: Ranks, case: Any) -> None:
    found = _statistics(engine)
    assert len(found) in (6, 9), case
    for others in gather_objects({name: tensor.tolist() for name, tensor in found.items()}, ranks):
        assert others == {name: tensor.tolist() for name, tensor in found.items()}, case


def _run(ranks: Ranks, folder: Path, builtin: str, backend: str, strategy: str, name: str, sizes: Any) -> None:
    case = (builtin, backend, strategy, name)
    facts = IMAGES if builtin == "cnn" else TABLE
    engine = _engine(ranks, builtin, backend, strategy)
    write_parameters(engine, ranks, folder / f"{builtin}.initial.safetensors")
    losses = _train(engine, ranks, facts, sizes)
    _check_alike(engine, ranks, case)
    (evaluated,) = engine.evaluate([random_rows(facts, 5, 99)])
    prefix = "-".join((*case, str(ranks.world_size)))
    write_parameters(engine, ranks, folder / f"{prefix}.safetensors")
    if ranks.rank == 0:
        torch.save({"losses": losses, "evaluated": evaluated.tolist()}, folder / f"{prefix}.pt")


def _check_skipped_step(ranks: Ranks, backend: str, strategy: str) -> None:
    engine = _engine(ranks, "mlp", backend, strategy)
    _train(engine, ranks, TABLE, _EVEN)
    before = _statistics(engine)
    batch = random_rows(TABLE, 4, 1)
    if ranks.rank == 0:
        batch["features"][0, 0] = torch.nan
    engine.train_batch([batch], 8)
    engine.clip_grad_norm(0.0)
    assert float(engine.step(_LR)) == 0.0, (backend, strategy)
    after = _statistics(engine)
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), (backend, strategy, name)


def _check_average(ranks: Ranks) -> None:
    """Where weights are averaged, so are the statistics that evaluation normalises by."""
    engine = _engine(ranks, "mlp", "torch", "zero2")
    average = WeightAverage(engine, 0.5)
    started = _statistics(engine)
    _train(engine, ranks, TABLE, _EVEN)
    average.update(torch.ones(()))
    trained = _statistics(engine)
    name = "model/layers.0.norm.running_mean"
    with average.in_place_of_weights():
        assert torch.allclose(_statistics(engine)[name], (started[name] + trained[name]) / 2)
    assert torch.equal(_statistics(engine)[name], trained[name])
    assert f"ema/{name.removeprefix('model/')}" in {part.name for part in average.state()}


def _on_2(ranks: Ranks, folder: Path) -> None:
    for backend, strategy in ON_2_RANKS:
        _run(ranks, folder, "cnn", backend, strategy, "even", _EVEN)
        _check_skipped_step(ranks, backend, strategy)
    for backend, strategy in (("torch", "ddp"), ("torch", "zero3"), ("bucketed", "zero3"), ("deepspeed", "zero3")):
        _run(ranks, folder, "mlp", backend, strategy, "ragged", _RAGGED)
    _check_average(ranks)


def _check_compiled(ranks: Ranks) -> None:
    losses = [
        _train(_engine(ranks, "mlp", "torch", "zero2", compile={"enabled": enabled}), ranks, TABLE, _EVEN)
        for enabled in (False, True)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_compiled_blocks_normalise_the_same() -> None:
    run_on_ranks(_check_compiled, 2, timeout_s=380)


def _on_4(ranks: Ranks, folder: Path) -> None:
    sizes = ((2, 2, 2, 2), (2, 2, 2, 2))
    for strategy in ("hsdp", "ddp"):
        _run(ranks, folder, "cnn", "torch", strategy, "even", sizes)


def _plain(folder: Path, builtin: str, sizes: Any) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    """One process that knows torch alone, on micro-batches of all ranks' rows."""
    arguments, facts = (_CNN, IMAGES) if builtin == "cnn" else (_MLP, TABLE)
    model = build_network(ModelConfig(builtin=builtin, arguments=arguments), facts, 3)  # type: ignore[arg-type]
    model.load_state_dict(load_file(folder / f"{builtin}.initial.safetensors"))
    optimizer = torch.optim.SGD(model.parameters(), lr=_LR)
    losses = []
    for step in range(_NUM_STEPS):
        total = 0.0
        optimizer.zero_grad()
        for batch in _batches(facts, step, sizes):
            labels = batch.pop("labels")
            loss = functional.cross_entropy(model(**batch), labels, reduction="sum") / sum(map(sum, sizes))
            loss.backward()
            total += loss.item()
        optimizer.step()
        losses.append(total)
    model.eval()
    batch = random_rows(facts, 5, 99)
    labels = batch.pop("labels")
    evaluated = functional.cross_entropy(model(**batch), labels, reduction="sum").item()
    return losses, [evaluated, 5.0], model.state_dict()


@pytest.mark.timeout(300)
def test_every_engine_normalises_as_one_process(tmp_path: Path) -> None:
    run_on_ranks(_run, 1, tmp_path, "cnn", "torch", "none", "even", ((8,), (8,)))
    run_on_ranks(_on_2, 2, tmp_path, timeout_s=200)
    run_on_ranks(_on_4, 4, tmp_path)
    plain = {name: _plain(tmp_path, *name) for name in (("cnn", _EVEN), ("mlp", _RAGGED))}
    results = sorted(tmp_path.glob("*.pt"))
    assert len(results) == 1 + len(ON_2_RANKS) + 4 + 2
    for path in results:
        losses, evaluated, tensors = plain["cnn", _EVEN] if path.name.startswith("cnn") else plain["mlp", _RAGGED]
        found = torch.load(path)
        assert found["losses"] == pytest.approx(losses, rel=1e-5), path.name
        assert found["evaluated"] == pytest.approx(evaluated, rel=1e-5), path.name
        after = load_file(path.with_suffix(".safetensors"))
        initial = load_file(tmp_path / f"{path.name[:3]}.initial.safetensors")
        assert after.keys() == tensors.keys(), path.name
        for name, tensor in tensors.items():
            assert (after[name].double() - tensor.double()).abs().max() < 1e-5, (path.name, name)
            # So that no comparison is of what nothing has changed.
            assert not torch.equal(after[name], initial[name]), (path.name, name)


def test_what_would_train_another_model_is_refused() -> None:
    model = build_network(ModelConfig(builtin="mlp", arguments=_MLP), TABLE, 3)
    refuse_batch_norm(model, ActivationCheckpointingConfig())
    with pytest.raises(UserError, match=r"mode=full runs the forward pass of layers\.0 twice, whose batch normalisat"):
        refuse_batch_norm(model, ActivationCheckpointingConfig(mode="full"))
    refuse_batch_norm(nn.Sequential(nn.BatchNorm1d(3)), ActivationCheckpointingConfig(mode="full"))
    model.head.norm = nn.BatchNorm1d(3, track_running_stats=False)
    with pytest.raises(UserError, match=r"head\.norm normalises by each batch in evaluation as well"):
        refuse_batch_norm(model, ActivationCheckpointingConfig())
    model.head.norm = nn.InstanceNorm1d(3)
    refuse_batch_norm(model, ActivationCheckpointingConfig())
    model.head.norm = nn.InstanceNorm1d(3, track_running_stats=True)
    with pytest.raises(UserError, match=r"head\.norm keeps running statistics of this rank's samples"):
        refuse_batch_norm(model, ActivationCheckpointingConfig())


def test_one_value_has_no_variance() -> None:
    norm: Any = nn.BatchNorm1d(3)
    norm.__class__, norm._group = SynchronizedBatchNorm, None
    with pytest.raises(UserError, match="batch normalisation over one value has no variance"):
        norm(torch.ones(1, 3))
    assert norm(torch.ones(2, 3)).isfinite().all()


@pytest.mark.parametrize("momentum", [0.1, 0.4, None])
def test_it_is_torchs_own_on_one_process(momentum: float | None) -> None:
    torch.manual_seed(0)
    ours: Any = nn.BatchNorm2d(3, momentum=momentum)
    theirs = nn.BatchNorm2d(3, momentum=momentum)
    ours.__class__, ours._group = SynchronizedBatchNorm, None
    for _ in range(3):
        # A mean far from 0, which one pass over the squares would not survive.
        one = (1000 + torch.randn(5, 3, 2, 4)).requires_grad_()
        other = one.detach().clone().requires_grad_()
        factor = torch.randn(5, 3, 2, 4)
        outputs = ours(one), theirs(other)
        assert torch.allclose(*outputs, atol=1e-3)
        for output in outputs:
            (output * factor).sum().backward()
        assert torch.allclose(one.grad, other.grad, atol=1e-3)  # type: ignore[arg-type]
    for name, buffer in theirs.named_buffers():
        assert torch.allclose(getattr(ours, name), buffer), name
    assert torch.allclose(ours.weight.grad, theirs.weight.grad, atol=1e-2)  # type: ignore[arg-type]
    assert torch.allclose(ours.eval()(one), theirs.eval()(one), atol=1e-3)
    half = ours(one.bfloat16())
    assert half.dtype is torch.bfloat16
