"""Runs with frozen parameters: every engine on 1, 2 and 3 ranks against one process that knows torch alone."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

from sharding.batch_norm import has_batch_norm
from sharding.engine import Batch, Engine
from sharding.ranks.errors import UserError
from sharding.ranks.process_group import Ranks
from tests.sharding.engine_cases import FACTS, ON_2_RANKS, num_targets, random_batch, tiny_config, tiny_engine
from tests.support import TINY_MODEL, run_on_ranks
from trainer.architectures.config import build_model_config
from trainer.model.freezing import freeze_parameters
from trainer.model.models import build_model_on_meta
from trainer.numerics.replica_check import ReplicaCheck
from trainer.optimizers.weight_average import WeightAverage
from trainer.tasks.registry import build_task

_NUM_STEPS = 3
_LR, _DECAY, _MOMENTUM = 1e-2, 0.5, 0.9
_UNTIED = TINY_MODEL | {"config": TINY_MODEL["config"] | {"tie_word_embeddings": False}}
_OPTIMIZER = {"name": "sgd", "lr": _LR, "weight_decay": _DECAY, "momentum": _MOMENTUM}
_FROZEN: dict[str, Sequence[str]] = {
    # Nothing that is trained lies in a block.
    "all but the head": ["model.*"],
    # The first blocks have no gradient for their inputs.
    "all but the end": ["model.embed_tokens.*", "model.layers.[01].*"],
    "here and there": ["*layernorm.weight", "model.layers.1.*", "model.layers.2.mlp.up_proj.weight", "lm_head.weight"],
}
_LAYOUTS = {
    1: (("torch", "none"), ("bucketed", "zero3")),
    2: ON_2_RANKS,
    3: (("torch", "ddp"), ("torch", "zero3"), ("bucketed", "zero3")),
}
_ALL_LAYOUTS = {1: (("torch", "none"), *ON_2_RANKS), 2: ON_2_RANKS, 3: ON_2_RANKS, 4: (("torch", "hsdp"),)}
# Those that gather and free parameters, each in its own way.
_GATHERING = (("torch", "zero3"), ("bucketed", "zero3"), ("deepspeed", "zero3"))


def _engine(ranks: Ranks, backend: str, strategy: str, frozen: Sequence[str], **sections: Any) -> Engine:
    model = _UNTIED | {"freeze": list(frozen)}
    return tiny_engine(ranks, strategy, backend=backend, model=model, optimizer=_OPTIMIZER, **sections)


def _batches(step: int) -> list[Batch]:
    return [random_batch(10 * step + index) for index in range(2)]


def _train(engine: Engine, ranks: Ranks) -> list[float]:
    losses = []
    for step in range(_NUM_STEPS):
        batches = _batches(step)
        losses.append(float(engine.train_batch(batches, num_targets(batches, ranks.world_size))))
        engine.clip_grad_norm(1.0)
        engine.step(_LR)
    return losses


def _train_plainly(
    initial: dict[str, torch.Tensor], frozen: Sequence[str]
) -> tuple[dict[str, torch.Tensor], list[float], list[float]]:
    """Parameters and losses; and the squared norms of the gradients of the next step's micro-batches."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(build_model_config(tiny_config({}, model=_UNTIED).model, FACTS))
    model.load_state_dict(initial)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(fnmatchcase(name, pattern) for pattern in frozen))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [{"params": [p], "weight_decay": _DECAY if p.ndim >= 2 else 0.0} for p in trained]
    optimizer = torch.optim.SGD(groups, lr=_LR, momentum=_MOMENTUM)

    def backward(batches: list[Batch], index: int) -> float:
        logits = model(batches[index]["input_ids"]).logits.flatten(0, 1)
        loss = functional.cross_entropy(logits, batches[index]["labels"].flatten(), reduction="sum")
        (loss / num_targets(batches, 1)).backward()
        return loss.item()

    losses, squares = [], []
    for step in range(_NUM_STEPS):
        optimizer.zero_grad()
        losses.append(sum(backward(_batches(step), index) for index in range(2)))
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
    for index in range(2):
        optimizer.zero_grad()
        backward(_batches(_NUM_STEPS), index)
        squares.append(float(nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None]) ** 2))
    return {name: p.detach() for name, p in model.named_parameters()}, losses, squares


def _write_expected(ranks: Ranks, root: Path) -> None:
    """What one plain process makes of each case."""
    parts = _engine(ranks, "torch", "none", ["model.*"]).state(with_optimizer=False)
    initial = {part.name.removeprefix("model/"): part.tensor.clone() for part in parts}
    save_file(initial, root / "initial")
    for case, frozen in _FROZEN.items():
        final, losses, squares = _train_plainly(initial, frozen)
        save_file(final, root / case)
        torch.save((losses, squares), root / f"{case}.losses")


def _check_case(ranks: Ranks, root: Path, engine: Engine, case: str, layout: tuple[object, ...]) -> None:
    initial, expected = load_file(root / "initial"), load_file(root / case)
    trained = {name for name in initial if not torch.equal(initial[name], expected[name])}
    assert trained == {name for name in initial if not any(fnmatchcase(name, p) for p in _FROZEN[case])}
    average = WeightAverage(engine, 0.5)
    assert {part.name.removeprefix("ema/") for part in average.state()} == trained, layout
    losses, squares = torch.load(root / f"{case}.losses")
    assert _train(engine, ranks) == pytest.approx(losses, rel=1e-5), layout
    average.update(torch.ones(()))
    with average.in_place_of_weights():
        (sums,) = engine.evaluate([random_batch(0)])
    assert float(sums[0]) != pytest.approx(float(engine.evaluate([random_batch(0)])[0][0]), rel=1e-7), layout
    ReplicaCheck(engine, ranks, lambda *_: pytest.fail("ranks differ")).run(1)
    found = {part.name: part for part in engine.state(with_optimizer=True)}
    assert {name.removeprefix("model/") for name in found if name.startswith("model/")} == initial.keys(), layout
    moments = {name.split("/")[1] for name in found if name.startswith("optimizer/")}
    assert moments == trained, layout
    for name, whole in expected.items():
        part = found[f"model/{name}"]
        assert part.global_shape == tuple(whole.shape), (layout, name)
        for box, piece in part.pieces():
            if name in trained:
                torch.testing.assert_close(piece, whole[box.slices], rtol=0.0, atol=1e-6)
            else:
                assert torch.equal(piece, initial[name][box.slices]), (layout, name)

    if layout[0] != "deepspeed":
        batches = _batches(_NUM_STEPS)
        found_squares = engine.train_batch_with_norms(batches, num_targets(batches, ranks.world_size))[1]
        shares = [square / ranks.world_size**2 for square in squares]
        assert found_squares.tolist() == pytest.approx(shares, rel=1e-4), layout


def _check(ranks: Ranks, root: Path, *, every_case: bool = False) -> None:
    """Each engine with one of the cases, those that gather with all; or every engine with every case."""
    if ranks.world_size == 1:
        _write_expected(ranks, root)
    layouts = _ALL_LAYOUTS if every_case else _LAYOUTS
    for index, layout in enumerate(layouts[ranks.world_size]):
        in_all = every_case or (ranks.world_size == 2 and layout in _GATHERING)
        for case in _FROZEN if in_all else [list(_FROZEN)[index % len(_FROZEN)]]:
            sections = {"replicate": 2} if layout[1] == "hsdp" else {}
            engine = _engine(ranks, *layout, _FROZEN[case], **sections)
            _check_case(ranks, root, engine, case, (*layout, ranks.world_size, case))
    for layout in _GATHERING if every_case or ranks.world_size == 2 else ():
        # The first blocks have nothing to recompute for; a frozen head makes no gradient of its own in chunks.
        for case in ("all but the end", "here and there")[0 if every_case else 1 :]:
            recomputed = {"activation_checkpointing": {"mode": "full"}, "task": {"loss_chunk_tokens": 5}}
            engine = _engine(ranks, *layout, _FROZEN[case], **recomputed)
            _check_case(ranks, root, engine, case, (*layout, ranks.world_size, case, "recomputed"))


@pytest.mark.timeout(300)
def test_every_engine_trains_what_is_not_frozen_as_one_process_does(tmp_path: Path) -> None:
    for num_ranks in _LAYOUTS:
        run_on_ranks(_check, num_ranks, tmp_path, timeout_s=200)


def _check_every_case(ranks: Ranks, root: Path) -> None:
    _check(ranks, root, every_case=True)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_engine_does_so_in_every_case(tmp_path: Path) -> None:
    for num_ranks in _ALL_LAYOUTS:
        run_on_ranks(_check_every_case, num_ranks, tmp_path, timeout_s=400)


def _check_compiled(ranks: Ranks, root: Path) -> None:
    sections = {"compile": {"enabled": True}, "activation_checkpointing": {"mode": "full"}}
    for backend, strategy in (("torch", "ddp"), ("torch", "zero3"), ("bucketed", "zero3")):
        for case in ("all but the end", "here and there"):
            engine = _engine(ranks, backend, strategy, _FROZEN[case], **sections)
            _check_case(ranks, root, engine, case, (backend, strategy, ranks.world_size, case, "compiled"))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_compiled_blocks_do_so_too(tmp_path: Path) -> None:
    run_on_ranks(_write_expected, 1, tmp_path)
    run_on_ranks(_check_compiled, 2, tmp_path, timeout_s=500)


# With rows that can be quantised.
_WIDE = TINY_MODEL | {"config": TINY_MODEL["config"] | {"hidden_size": 96, "intermediate_size": 70}}


def _check_optimizers(ranks: Ranks, root: Path) -> None:
    for name in ("muon", "adafactor", "adamw8bit"):
        for frozen in (["*.0.*", "*.up_proj.weight"], ["model.embed_tokens.*", "*norm.weight"]):
            model = _WIDE | {"freeze": frozen}
            engine = tiny_engine(
                ranks, "none" if ranks.world_size == 1 else "zero2", model=model, optimizer={"name": name, "lr": _LR}
            )
            before = {part.name: part.tensor.clone() for part in engine.state(with_optimizer=False)}
            losses, file = _train(engine, ranks), root / f"{name}-{frozen[0]}.losses"
            if ranks.world_size == 1:
                torch.save(losses, file)
            assert losses == pytest.approx(torch.load(file), rel=2e-5), (name, frozen)
            for part in engine.state(with_optimizer=True):
                kind, parameter, *_ = part.name.split("/")
                is_frozen = any(fnmatchcase(parameter, pattern) for pattern in frozen)
                assert not (is_frozen and kind == "optimizer"), part.name
                if kind == "model" and part.tensor.numel():
                    assert torch.equal(part.tensor, before[part.name]) == is_frozen, part.name


def test_optimizers_that_need_whole_rows_leave_it_out(tmp_path: Path) -> None:
    run_on_ranks(_check_optimizers, 1, tmp_path)
    run_on_ranks(_check_optimizers, 2, tmp_path)


def test_frozen_batch_norm_keeps_its_statistics_and_uses_them() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    freeze_parameters(model, ["0.*", "1.*", "2.weight"])
    model.train()
    frozen, other = model[1], model[2]
    assert not frozen.training
    # Of its bias it is trained.
    assert other.training
    rows = torch.randn(8, 3)
    for _ in range(2):
        hidden = model[0](rows)
        torch.testing.assert_close(frozen(hidden), hidden / (1 + frozen.eps) ** 0.5)
        model(rows)
    assert torch.equal(frozen.running_mean, torch.zeros(4))
    assert int(frozen.num_batches_tracked) == 0
    assert int(other.num_batches_tracked) == 2
    assert has_batch_norm(model)
    assert not has_batch_norm(model[:2])


def _frozen_names(freeze: list[str], model: dict[str, Any] = TINY_MODEL) -> set[str]:
    built = build_model_on_meta(build_task("causal-lm"), tiny_config({}, model=model | {"freeze": freeze}).model, FACTS)
    return {name for name, parameter in built.named_parameters() if not parameter.requires_grad}


def test_a_shared_parameter_is_frozen_by_any_of_its_names() -> None:
    assert _frozen_names([]) == set()
    assert _frozen_names(["lm_head.weight"]) == _frozen_names(["*.embed_tokens.*"]) == {"model.embed_tokens.weight"}
    assert _frozen_names(["lm_head.weight"], _UNTIED) == {"lm_head.weight"}


def test_patterns_that_cannot_be_meant_are_refused() -> None:
    with pytest.raises(
        UserError, match=r"model\.freeze\.1=model\.layer\.0\.\* matches no parameter; the nearest .*0\."
    ):
        _frozen_names(["model.norm.*", "model.layer.0.*"])
    with pytest.raises(UserError, match=r"model\.freeze=\['model\.\*'\] leaves nothing to train: LlamaForCausalLM"):
        _frozen_names(["model.*"])
