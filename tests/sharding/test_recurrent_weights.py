"""An LSTM under every engine, where layers try to move their weights away, as they do on a GPU."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

from sharding.ranks.object_exchange import sum_over_ranks
from sharding.ranks.process_group import Ranks
from tests.sharding.engine_cases import ON_2_RANKS
from tests.sharding.network_cases import NUM_CLASSES, TEXTS, network_config, network_engine, random_rows, split_rows
from tests.support import run_on_ranks
from trainer.architectures.networks import build_network
from trainer.config.sections import ModelConfig
from trainer.optimizers.weight_average import WeightAverage
from trainer.parity.cases import write_parameters

_ARGUMENTS = {"embedding_size": 6, "hidden_size": 5, "num_layers": 2}
_NUM_STEPS = 3
_NUM_ROWS = 12
_LR = 0.5
_COMPUTE = ("fp32", "bf16")


@contextmanager
def _moving_weights() -> Iterator[None]:
    """Have layers do on a CPU what cuDNN does: compute with copies of their weights, to which parameters then point."""
    original = nn.RNNBase.flatten_parameters

    def flatten(self: Any) -> None:
        for weight in self._flat_weights:
            if isinstance(weight, nn.Parameter) and not weight.is_meta:
                weight.data = weight.data.clone()

    nn.RNNBase.flatten_parameters = flatten  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.RNNBase.flatten_parameters = original  # type: ignore[method-assign]


def _run(ranks: Ranks, folder: Path, backend: str, strategy: str, compute: str) -> None:
    parallel = {"strategy": strategy, "backend": backend, "replicate": 2 if strategy == "hsdp" else 1}
    config = network_config("lstm", _ARGUMENTS, parallel, precision={"compute": compute})
    engine = network_engine(config, TEXTS, ranks)
    average = WeightAverage(engine, 0.5)
    write_parameters(engine, ranks, folder / "initial.safetensors")
    rows = split_rows(random_rows(TEXTS, _NUM_ROWS, 0), [_NUM_ROWS // ranks.world_size] * ranks.world_size)[ranks.rank]
    micro_batches = split_rows(rows, [len(rows["labels"]) // 2] * 2)
    losses = []
    for _ in range(_NUM_STEPS):
        loss = engine.train_batch(micro_batches, _NUM_ROWS)
        engine.clip_grad_norm(0.0)
        engine.step(_LR)
        losses.append(sum_over_ranks(loss[None], ranks)[0] / _NUM_ROWS)
    (evaluated,) = engine.evaluate([rows])
    name = f"{backend}-{strategy}-{ranks.world_size}-{compute}"
    write_parameters(engine, ranks, folder / f"{name}.safetensors")
    average.update(torch.ones(()))
    with average.in_place_of_weights():
        write_parameters(engine, ranks, folder / f"{name}.average.safetensors")
    total = sum_over_ranks(evaluated, ranks)
    if ranks.rank == 0:
        torch.save({"losses": losses, "evaluated": total[0] / total[1]}, folder / f"{name}.pt")


def _run_all(ranks: Ranks, folder: Path, cases: tuple[tuple[str, str], ...]) -> None:
    with _moving_weights():
        for backend, strategy in cases:
            for compute in _COMPUTE:
                _run(ranks, folder, backend, strategy, compute)


def _plain(initial: Path, compute: str) -> tuple[list[float], float, dict[str, torch.Tensor]]:
    model = build_network(ModelConfig(builtin="lstm", arguments=_ARGUMENTS), TEXTS, NUM_CLASSES)
    model.load_state_dict(load_file(initial))
    optimizer = torch.optim.SGD(model.parameters(), lr=_LR)
    batch = random_rows(TEXTS, _NUM_ROWS, 0)
    labels = batch.pop("labels")

    def loss() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=compute == "bf16"):
            logits = model(**batch).float()
        return functional.cross_entropy(logits, labels)

    losses = []
    for _ in range(_NUM_STEPS):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses, loss().item(), {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.timeout(300)
def test_every_engine_trains_an_lstm_as_one_process(tmp_path: Path) -> None:
    run_on_ranks(_run_all, 1, tmp_path, (("torch", "none"),))
    run_on_ranks(_run_all, 2, tmp_path, ON_2_RANKS, timeout_s=200)
    initial = load_file(tmp_path / "initial.safetensors")
    for compute in _COMPUTE:
        losses, evaluated, plain = _plain(tmp_path / "initial.safetensors", compute)
        results = sorted(tmp_path.glob(f"*-{compute}.pt"))
        assert len(results) == 1 + len(ON_2_RANKS)
        rel, atol = (1e-5, 1e-5) if compute == "fp32" else (5e-3, 5e-3)
        for path in results:
            found = torch.load(path)
            assert found["losses"] == pytest.approx(losses, rel=rel), path.name
            # The same batch's loss after the last update, which evaluation must see.
            assert found["evaluated"] == pytest.approx(evaluated, rel=rel), path.name
            ever = [*found["losses"], found["evaluated"]]
            assert all(abs(one - other) > 1e-3 for one, other in itertools.pairwise(ever)), path.name
            after = load_file(path.with_suffix(".safetensors"))
            average = load_file(path.with_suffix(".average.safetensors"))
            assert after.keys() == initial.keys() == plain.keys()
            for name, tensor in plain.items():
                assert (after[name] - tensor).abs().max() < atol, (path.name, name)
                assert not torch.equal(after[name], initial[name]), (path.name, name)
                assert torch.allclose(average[name], (initial[name] + after[name]) / 2, atol=1e-6), (path.name, name)
