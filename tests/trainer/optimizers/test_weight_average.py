"""The moving average of the weights under every strategy, against a loop written out."""

import math

import pytest
import torch

from sharding.engine import Batch, Engine
from sharding.ranks.object_exchange import sum_over_ranks
from sharding.ranks.process_group import Ranks
from tests.sharding.engine_cases import STRATEGIES, num_targets, random_batch, tiny_engine
from tests.support import run_on_ranks
from trainer.optimizers.weight_average import WeightAverage

_DECAY = 0.75


def _step(engine: Engine, ranks: Ranks, seed: int, *, skipped: bool = False) -> torch.Tensor:
    batches = [random_batch(seed), random_batch(seed + 1)]
    engine.train_batch(batches, num_targets(batches, ranks.world_size))
    if skipped:
        for _, parameter in engine.named_parameters():
            parameter.grad.fill_(torch.inf)
    engine.clip_grad_norm(1.0)
    return engine.step(1e-2)


def _copies(shards: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: shard.clone() for name, shard in shards.items()}


def _evaluate(engine: Engine, batch: Batch) -> list[float]:
    (sums,) = engine.evaluate([batch])
    return sums.tolist()


def _average_on_ranks(ranks: Ranks) -> None:
    for strategy in STRATEGIES if ranks.world_size > 1 else ("none",):
        engine = tiny_engine(ranks, strategy)
        average = WeightAverage(engine, _DECAY)
        expected = _copies(engine.named_local_shards())
        for step, skipped in enumerate((False, False, True, False)):
            stepped = _step(engine, ranks, 10 * step, skipped=skipped)
            average.update(stepped)
            assert bool(stepped) != skipped
            if not skipped:
                for name, weights in engine.named_local_shards().items():
                    expected[name] += (1 - _DECAY) * (weights - expected[name])
            found = {part.name.removeprefix("ema/"): part.tensor for part in average.state()}
            assert found.keys() == expected.keys()
            for name, tensor in found.items():
                assert torch.allclose(tensor, expected[name], rtol=1e-6, atol=1e-8), (strategy, step, name)
        _check_division(average, engine, ranks, strategy)
        _check_exchange(average, engine, ranks, strategy)


def _check_division(average: WeightAverage, engine: Engine, ranks: Ranks, strategy: str) -> None:
    """Every element is written once, and a rank holds as much of the average as of the weights."""
    parts = average.state()
    written = sum(part.tensor.numel() for part in parts if part.is_written_here)
    whole = sum(math.prod(part.global_shape) for part in parts)
    assert sum_over_ranks(torch.tensor([written]), ranks) == [whole], strategy
    held = sum(shard.numel() for shard in engine.named_local_shards().values())
    assert sum(part.tensor.numel() for part in parts) == held, strategy
    if strategy.startswith("zero"):
        assert held < 0.6 * whole, strategy


def _check_exchange(average: WeightAverage, engine: Engine, ranks: Ranks, strategy: str) -> None:
    batch = random_batch(99)
    weights, averages = _copies(engine.named_local_shards()), [part.tensor.clone() for part in average.state()]
    before = _evaluate(engine, batch)
    with average.in_place_of_weights():
        inside = _evaluate(engine, batch)
        for part, tensor in zip(average.state(), averages, strict=True):
            assert torch.equal(engine.named_local_shards()[part.name.removeprefix("ema/")], tensor), strategy
    assert inside[0] != before[0], strategy
    assert _evaluate(engine, batch) == before, strategy
    for name, shard in engine.named_local_shards().items():
        assert torch.equal(shard, weights[name]), (strategy, name)
    for part, tensor in zip(average.state(), averages, strict=True):
        assert torch.equal(part.tensor, tensor), strategy
    # The average as the weights of another engine says the same.
    other = tiny_engine(ranks, strategy)
    slices = {part.name: part.tensor for part in average.state()}
    other.load_state(
        lambda part: part.tensor.copy_(slices[part.name.replace("model/", "ema/")]),  # type: ignore[arg-type, return-value]
        with_optimizer=False,
    )
    assert _evaluate(other, batch) == inside, strategy
    average.load(None)
    for part in average.state():
        assert torch.equal(part.tensor, weights[part.name.removeprefix("ema/")]), strategy


def test_the_average_follows_the_weights_on_two_ranks() -> None:
    run_on_ranks(_average_on_ranks, 2)


def test_the_average_follows_the_weights_in_one_process() -> None:
    run_on_ranks(_average_on_ranks, 1)


def _average_of_flat_runs(ranks: Ranks) -> None:
    for backend, strategy in (("deepspeed", "zero2"), ("deepspeed", "zero3"), ("bucketed", "zero2")):
        sections = {"backend": backend}
        engine = tiny_engine(ranks, strategy, **sections)
        average = WeightAverage(engine, _DECAY)
        masters = {part.name: part for part in engine.state(with_optimizer=False)}
        expected = {key: part.tensor.clone() for key, part in masters.items()}
        for step in range(2):
            average.update(_step(engine, ranks, 10 * step))
            for key, part in masters.items():
                expected[key] += (1 - _DECAY) * (part.tensor - expected[key])
        found = {part.name.replace("ema/", "model/"): part.tensor for part in average.state()}
        assert found.keys() == expected.keys()
        assert all(torch.allclose(tensor, expected[key], rtol=1e-6, atol=1e-8) for key, tensor in found.items())
        held = sum(shard.numel() for shard in engine.named_local_shards().values())
        assert sum(tensor.numel() for tensor in found.values()) == held, strategy
        # Ranks compute with copies of the masters, which must follow the exchange both ways.
        batch, before = random_batch(99), _evaluate(engine, random_batch(99))
        with average.in_place_of_weights():
            inside = _evaluate(engine, batch)
        assert inside[0] != before[0], strategy
        assert _evaluate(engine, batch) == before, strategy
        other = tiny_engine(ranks, strategy, **sections)
        other.load_state(
            lambda part: part.tensor.copy_(expected[part.name]),  # type: ignore[arg-type, return-value]  # noqa: B023
            with_optimizer=False,
        )
        assert _evaluate(other, batch) == pytest.approx(inside, rel=1e-6), strategy


def test_the_average_follows_masters_in_flat_runs() -> None:
    run_on_ranks(_average_of_flat_runs, 2, timeout_s=200)
