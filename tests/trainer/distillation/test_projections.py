"""Hidden states of different widths: a projection is trained with the student under every layout, and stays behind."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from sharding.ranks.errors import UserError
from sharding.ranks.process_group import Ranks
from tests.runs_in_process import RunsInProcess, computed_lines, saved_state
from tests.support import run_on_ranks, tiny_values
from tests.trainer.distillation.teachers import row_values, text_values
from trainer.checkpoint.reader import open_checkpoint
from trainer.config import RunConfig, parse_config
from trainer.data.facts import SampleFacts
from trainer.deploy.export import export_model
from trainer.distillation.projections import add_projections, output_widths, project
from trainer.parity.cases import ParityCase
from trainer.parity.comparison import parity_cases, run_parity

MLP = {"builtin": "mlp", "arguments": {"hidden_sizes": [10, 14]}}
NAMES = ("distillation_projections.0_to_1.weight", "distillation_projections.-1_to_-1.weight")


def _failed(config: RunConfig, cases: list[ParityCase], folder: Path) -> list[Any]:
    folder.mkdir()
    rows = run_parity(config, cases, folder)
    assert len(rows) == len(cases)
    for case in cases:
        # They have moved, as those of the plain process have.
        before, after = (load_file(folder / f"{case.label}.{when}.safetensors") for when in ("initial", "final"))
        names = [name for name in before if name.startswith("distillation_projections.")]
        assert len(names) == len(config.distill.layers)
        assert not any(torch.equal(before[name], after[name]) for name in names)
    return [row for row in rows if not row.passed]


@pytest.mark.timeout(400)
def test_every_engine_trains_projections_as_one_process(teachers: Path, tmp_path: Path) -> None:
    # Widths of 10 and 14, and of the teacher's last block 12.
    distill = {"teacher": str(teachers / "runs" / "cnn"), "layers": [[0, -1], [1, -1]], "projection": True}
    config = parse_config(row_values(teachers, "student", MLP, distill=distill), "test")
    cases = [case for case in parity_cases([2], ()) if case.accumulation_steps > 1]
    assert len({(case.backend, case.strategy) for case in cases}) == len(cases) == 11
    cases += [ParityCase("zero2", 2, 3, "sgd", compute="bf16"), ParityCase("ddp", 2, 3, "sgd", compute="bf16")]
    assert _failed(config, cases, tmp_path / "out") == []


def _language_models(teachers: Path, tmp_path: Path) -> RunConfig:
    values = tiny_values(tmp_path / "runs", teachers / "cache", teachers / "documents")
    values["model"] = values["model"] | {
        "config": values["model"]["config"] | {"hidden_size": 24, "num_attention_heads": 3, "num_key_value_heads": 3}
    }
    values["optimizer"] = {"lr": 1e-2}
    values["activation_checkpointing"] = {"mode": "full"}
    distill = {"teacher": str(teachers / "exported"), "layers": [[0, 1], [-1, -1]], "projection": True}
    return parse_config(values | {"distill": distill}, "test")


@pytest.mark.timeout(400)
def test_language_models_of_other_widths_distil_as_one_process(teachers: Path, tmp_path: Path) -> None:
    cases = [
        ParityCase("zero3", 2, 3, "muon"),
        ParityCase("zero3", 2, 3, "sgd", "bucketed", trained="some"),
        ParityCase("zero3", 2, 3, "sgd", trained="adapters"),
        ParityCase("zero3", 2, 1, "sgd", "deepspeed"),
    ]
    assert _failed(_language_models(teachers, tmp_path), cases, tmp_path / "out") == []


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_groups_of_ranks_do_so_too(teachers: Path, tmp_path: Path) -> None:
    cases = [ParityCase("hsdp", 4, 3, "sgd"), ParityCase("zero3", 3, 2, "sgd", "bucketed", compute="bf16")]
    assert _failed(_language_models(teachers, tmp_path), cases, tmp_path / "out") == []


@pytest.mark.timeout(400)
def test_an_lstm_of_another_width_does_so_too(teachers: Path, tmp_path: Path) -> None:
    lstm = {"builtin": "lstm", "arguments": {"embedding_size": 6, "hidden_size": 5, "mean_embedding": False}}
    distill = {"teacher": str(teachers / "runs" / "texts"), "layers": [[-1, 0]], "projection": True}
    config = parse_config(text_values(teachers, "student", lstm, distill=distill), "test")
    assert _failed(config, [ParityCase("zero3", 2, 3, "sgd", "bucketed")], tmp_path / "out") == []


def _train_and_leave(ranks: Ranks, root: Path, teachers: Path) -> None:
    runs = RunsInProcess(ranks, root, teachers / "documents")
    data = {"cache_dir": str(teachers / "cache")}
    sections: dict[str, Any] = {
        "data": data,
        "distill": {
            "teacher": f"{teachers / 'runs' / 'llama'}@3",
            "layers": [[0, 1], [-1, -1]],
            "projection": True,
        },
        "model": {"config": {**tiny_values(root, root, root)["model"]["config"], "hidden_size": 24}},
        "parallel": {"strategy": "zero3"},
        "optimizer": {"ema_decay": 0.9},
        "evaluation": {"every_steps": 4, "max_sequences": 6},
    }
    whole = runs.train("whole", steps=8, **sections)
    runs.train("pieces", steps=8, stop_at=6, **sections)
    pieces = runs.train("pieces", steps=8, **sections)
    assert computed_lines(pieces) == computed_lines(whole)
    expected = saved_state(whole, 8)[1]
    tensors = saved_state(pieces, 8)[1]
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items())
    for name in NAMES:
        assert {f"model/{name}", f"ema/{name}", f"optimizer/{name}/exp_avg"} <= tensors.keys()

    # Another layout goes on with them.
    runs.train("resharded", steps=8, stop_at=6, **sections)
    other = sections | {"parallel": {"backend": "bucketed", "strategy": "zero2"}}
    resharded = saved_state(runs.train("resharded", steps=8, **other), 8)[1]
    assert resharded.keys() == expected.keys()
    for name in NAMES:
        torch.testing.assert_close(resharded[f"model/{name}"], expected[f"model/{name}"], rtol=1e-4, atol=1e-5)

    # A run that begins with the weights has none, or new ones; a step that changes nothing shows what it began with.
    weights = {"checkpoint": {"from": str(whole.path), "load": "weights"}, "optimizer": {"lr": 1e-30}}
    plain = {key: sections[key] for key in ("data", "model", "parallel")}
    alone = saved_state(runs.train("alone", steps=1, **plain, **weights), 1)[1]
    taught = saved_state(runs.train("taught", steps=1, **plain, distill=sections["distill"], **weights), 1)[1]
    of_model = {name for name in expected if name.startswith("model/")}
    assert {name for name in alone if name.startswith("model/")} == of_model - {f"model/{name}" for name in NAMES}
    assert {name for name in taught if name.startswith("model/")} == of_model
    for name in of_model:
        assert name not in alone or torch.equal(alone[name], expected[name])
        assert torch.equal(taught[name], expected[name]) != (name.removeprefix("model/") in NAMES)

    if ranks.rank == 0:
        export_model(open_checkpoint(str(whole.path), None), root / "exported")
        exported = load_file(root / "exported" / "model.safetensors")
        assert not any("projection" in name for name in exported)
        assert all(torch.equal(tensor, expected[f"model/{name}"]) for name, tensor in exported.items())


@pytest.mark.timeout(300)
def test_projections_go_on_with_the_run_and_stay_behind_elsewhere(teachers: Path, tmp_path: Path) -> None:
    run_on_ranks(_train_and_leave, 2, tmp_path, teachers)


class _Looks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 3)])

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.layers[0](features) if features.sum() > 0 else features


def test_what_has_no_known_width_is_refused() -> None:
    with torch.device("meta"):
        model = _Looks()
    with pytest.raises(UserError, match=r"projection=true must know how wide .* but the model has no hidden_size and"):
        output_widths(model, SampleFacts(num_features=4), [0], "the model")
    ((pair, projection),) = add_projections(model, [(0, 1)], [(3, 5)]).items()
    assert projection.weight.shape == (5, 3)
    for shape in ((2, 4), (2, 6, 3, 3)):
        with pytest.raises(UserError, match=r"rows of width 3 .* block 0 of the model gives out \[2, "):
            project(torch.empty(shape, device="meta"), projection, pair)
    with pytest.raises(UserError, match=r"_Looks has an attribute of this name; give that another one"):
        add_projections(model, [(0, 1)], [(3, 5)])
