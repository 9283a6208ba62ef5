"""One model with everything that makes a layout stumble, under every engine: parity, saving, verifying, resuming."""

from pathlib import Path

import pytest
import torch

from sharding.blocks import sharding_units
from sharding.ranks.errors import UserError
from sharding.ranks.process_group import Ranks
from sharding.zero import refuse_scalars
from tests.saved_state import save_state
from tests.sharding import nasty_model
from tests.sharding.engine_cases import ON_2_RANKS
from tests.support import run_on_ranks
from trainer.checkpoint.reader import CheckpointReader
from trainer.numerics.replica_check import ReplicaCheck
from trainer.optimizers.weight_average import WeightAverage

_ON_4 = (("torch", "ddp"), ("torch", "hsdp"), ("torch", "zero3"), ("bucketed", "zero2"), ("bucketed", "hsdp"))


def _check(ranks: Ranks, root: Path, cases: tuple[tuple[str, str], ...]) -> None:
    """Train, save, go on; and go on from what was saved, by the same engine and by one plain process."""
    for backend, strategy in cases:
        case, folder = (backend, strategy, ranks.world_size), root / f"{backend}-{strategy}-{ranks.world_size}"
        save_state(nasty_model.nasty_engine(ranks, backend, strategy), folder / "initial", ranks)
        # Saved for the first time after steps, when the optimizer has no state of what never had a gradient.
        engine = nasty_model.nasty_engine(ranks, backend, strategy)
        nasty_model.train(engine, ranks, range(2))
        save_state(engine, folder / "middle", ranks)
        middle = nasty_model.state_hash(engine, ranks)
        losses = nasty_model.train(engine, ranks, range(2, 4))
        save_state(engine, folder / "final", ranks)
        resumed = nasty_model.nasty_engine(ranks, backend, strategy)
        nasty_model.load(resumed, folder / "middle")
        assert nasty_model.state_hash(resumed, ranks) == middle, case
        assert nasty_model.train(resumed, ranks, range(2, 4)) == losses, case
        save_state(resumed, folder / "resumed", ranks)
        nasty_model.load(resumed, root / "torch-none-1" / "middle")
        nasty_model.train(resumed, ranks, range(2, 4))
        save_state(resumed, folder / "from-elsewhere", ranks)
        if backend != "deepspeed":
            squares = engine.train_batch_with_norms(*nasty_model.share_of(ranks, step=4))[1]
            assert len(squares) == int((squares > 0).sum()) == 2, case
            engine.drop_gradients()


def _check_on_2(ranks: Ranks, root: Path) -> None:
    _check(ranks, root, ON_2_RANKS)
    # Before it would find that there is no GPU.
    with pytest.raises(UserError, match="blocks of NastyModel share parameters; use"):
        nasty_model.nasty_engine(ranks, "accelerate", "zero3")


def _check_on_4(ranks: Ranks, root: Path) -> None:
    _check(ranks, root, _ON_4)
    for backend, strategy in (*_ON_4, ("bucketed", "zero1"), ("bucketed", "zero3")):
        _check_with_nothing(ranks, root / "little", backend, strategy)
    for optimizer in ("muon", "adafactor"):
        engine = nasty_model.nasty_engine(ranks, "torch", "zero3", optimizer, trained="layers.1.gate.")
        nasty_model.train(engine, ranks, range(2))


def _check_with_nothing(ranks: Ranks, root: Path, backend: str, strategy: str) -> None:
    """One row is trained, so that most ranks own none of what is: they take part in all the same."""
    case, folder = (backend, strategy), root / f"{backend}-{strategy}"
    engine = nasty_model.nasty_engine(ranks, backend, strategy, trained="layers.1.gate.")
    average = WeightAverage(engine, 0.9)
    nasty_model.train(engine, ranks, range(1))
    average.update(torch.ones(()))
    with average.in_place_of_weights():
        engine.evaluate(nasty_model.share_of(ranks, step=0)[0][:1])
    ReplicaCheck(engine, ranks, lambda *_: None).run(1)
    save_state(engine, folder, ranks)
    before = nasty_model.state_hash(engine, ranks)
    resumed = nasty_model.nasty_engine(ranks, backend, strategy, trained="layers.1.gate.")
    nasty_model.load(resumed, folder)
    assert nasty_model.state_hash(resumed, ranks) == before, case
    assert nasty_model.train(resumed, ranks, range(1, 3)) == nasty_model.train(engine, ranks, range(1, 3)), case


@pytest.mark.timeout(400)
def test_every_engine_trains_saves_and_resumes_it(tmp_path: Path) -> None:
    run_on_ranks(_check, 1, tmp_path, (("torch", "none"),))
    run_on_ranks(_check_on_2, 2, tmp_path, timeout_s=240)
    run_on_ranks(_check_on_4, 4, tmp_path, timeout_s=180)
    initial = nasty_model.whole_state(tmp_path / "torch-none-1" / "initial")
    plain = nasty_model.train_plainly(initial, range(4))
    for name in ("layers.1.never_used.weight", "never_used"):
        assert torch.equal(plain[name], initial[f"model/{name}"])
    folders = sorted(path for path in tmp_path.iterdir() if path.name != "little")
    assert len(folders) == 1 + len(ON_2_RANKS) + len(_ON_4)
    for folder in folders:
        CheckpointReader(folder / "final").verify()
        _assert_equal(nasty_model.whole_state(folder / "initial"), initial, folder.name)
        final = nasty_model.whole_state(folder / "final")
        _assert_equal(nasty_model.whole_state(folder / "resumed"), final, folder.name)
        _check_against_plain(final, initial, plain, folder.name)
        _check_against_plain(nasty_model.whole_state(folder / "from-elsewhere"), initial, plain, folder.name)


def test_a_scalar_is_refused_by_name() -> None:
    model = torch.nn.Module()
    model.layer = torch.nn.Linear(2, 2)
    refuse_scalars(model, "zero2")
    model.layer.scale = torch.nn.Parameter(torch.ones(()))
    with pytest.raises(UserError, match=r"strategy=zero2 .* but layer\.scale of Module is a scalar; give it the shape"):
        refuse_scalars(model, "zero2")


def test_blocks_that_share_parameters_are_one_unit() -> None:
    alone, first, second, third, head = (torch.nn.Linear(2, 2) for _ in range(5))
    model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([first, alone, second, third]), "head": head})
    blocks = [first, alone, second, third]
    assert sharding_units(model, blocks) == [[first], [alone], [second], [third]]
    second.weight = first.weight
    assert sharding_units(model, blocks) == [[alone], [first, second], [third]]
    # By way of another.
    third.weight, third.bias = torch.nn.Parameter(torch.ones(2, 2)), second.bias
    assert sharding_units(model, blocks) == [[alone], [first, second, third]]
    # With what is in no block they are sharded with that.
    head.weight = third.weight
    assert sharding_units(model, blocks) == [[alone]]


def _assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], case: str) -> None:
    assert found.keys() == expected.keys(), case
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), (case, name)


def _check_against_plain(
    state: dict[str, torch.Tensor], initial: dict[str, torch.Tensor], plain: dict[str, torch.Tensor], case: str
) -> None:
    for name, tensor in plain.items():
        found, before = state.get(f"model/{name}"), initial.get(f"model/{name}")
        if found is None or before is None:
            # The other name of a tie, or a buffer that is not kept.
            shared = ("head.weight", "layers.2.inner.weight", "early.weight")
            assert name in shared or name.endswith("frequencies"), (case, name)
        elif torch.equal(tensor, before):
            # Buffers, what is frozen, and what no gradient ever reached: not decayed either.
            assert torch.equal(found, before), (case, name)
            if (moment := state.get(f"optimizer/{name}/exp_avg_sq")) is not None:
                assert not moment.any(), (case, name)
        else:
            torch.testing.assert_close(found, tensor, rtol=0.0, atol=1e-5, msg=lambda m, n=name: f"{case} {n}: {m}")
