"""What a student learns of its teacher: the loss, every layout, and a run that is interrupted."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from launcher.run import run as launch
from sharding.ranks.errors import UserError
from sharding.ranks.process_group import Ranks
from tests.runs_in_process import RunsInProcess, computed_lines, saved_state
from tests.support import run_on_ranks, tiny_values
from tests.trainer.distillation.teachers import row_values, text_values
from trainer.config import parse_config
from trainer.data.facts import SampleFacts
from trainer.distillation.begin import _as_rank_0_finds_it
from trainer.distillation.identity import TEACHER_FILE
from trainer.distillation.teacher import renormalization
from trainer.parity.cases import ParityCase
from trainer.parity.comparison import parity_cases, run_parity
from trainer.tasks.divergence import difference_sum, divergence_sum

MLP = {"builtin": "mlp", "arguments": {"hidden_sizes": [10, 12]}}


def test_the_divergence_is_that_of_softened_predictions() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(3, 4, 7, generator=generator) for _ in range(2))
    student.requires_grad_()
    is_target = torch.rand(3, 4, generator=generator) < 0.5
    assert 0 < is_target.sum() < 12
    found = divergence_sum(student, teacher, is_target, 3.0)
    p, q = ((logits[is_target].detach().double() / 3).softmax(-1) for logits in (teacher, student))
    assert found.item() == pytest.approx(float(9 * (p * (p / q).log()).sum()), rel=1e-5)
    (gradient,) = torch.autograd.grad(found, student)
    torch.testing.assert_close(gradient[is_target].double(), 3 * (q - p), rtol=1e-4, atol=1e-6)
    assert not gradient[~is_target].any()
    assert divergence_sum(teacher, teacher, is_target, 3.0).item() == pytest.approx(0, abs=1e-5)


def test_padding_is_no_part_of_hidden_states() -> None:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(2, 3, 5, 4, generator=generator)
    student, teacher = states
    is_token = torch.arange(5) < torch.tensor([5, 2, 3])[:, None]
    is_target = torch.tensor([True, True, False])
    expected = sum(functional.mse_loss(student[row, :num], teacher[row, :num]) for row, num in ((0, 5), (1, 2)))
    found = difference_sum(student, teacher, is_target, is_token)
    torch.testing.assert_close(found, expected)
    # Longer padding changes nothing.
    longer = [functional.pad(one, (0, 0, 0, 3), value=9.0 * place) for place, one in enumerate((student, teacher))]
    torch.testing.assert_close(difference_sum(*longer, is_target, functional.pad(is_token, (0, 3))), found)
    # Where each token may be a target, these alone count.
    of_tokens = difference_sum(student, teacher, is_token, is_token)
    torch.testing.assert_close(of_tokens, ((student - teacher)[is_token] ** 2).mean(dim=-1).sum())


def test_the_teacher_reads_rows_by_its_own_normalisation() -> None:
    pixels = torch.rand(2, 3, 4, 4)
    ours = SampleFacts(means=(0.1, 0.2, 0.3), scales=(0.5, 0.25, 1.0))
    its = SampleFacts(means=(0.4, 0.1, 0.0), scales=(0.2, 0.4, 0.5))

    def normalized(facts: SampleFacts) -> torch.Tensor:
        means, scales = (torch.tensor(of)[:, None, None] for of in (facts.means, facts.scales))
        return (pixels - means) / scales

    batch = {"pixel_values": normalized(ours), "labels": torch.zeros(2)}
    found = renormalization(ours, its)(batch)
    torch.testing.assert_close(found["pixel_values"], normalized(its))
    assert found["labels"] is batch["labels"]
    assert renormalization(ours, ours)(batch) is batch


def _failed(config: Any, cases: list[ParityCase], folder: Path) -> list[Any]:
    folder.mkdir()
    rows = run_parity(config, cases, folder)
    assert len(rows) == len(cases)
    return [row for row in rows if not row.passed]


@pytest.mark.timeout(400)
def test_every_engine_distils_a_convolutional_network_as_one_process(teachers: Path, tmp_path: Path) -> None:
    distill = {"teacher": str(teachers / "runs" / "cnn"), "layers": [[1, -1]], "layer_weight": 0.3}
    # Other training rows, and so another normalisation than the teacher's.
    data = {"source": "digits", "validation_fraction": 0.5, "cache_dir": str(teachers / "cache")}
    config = parse_config(row_values(teachers, "student", MLP, distill=distill, data=data), "test")
    cases = [case for case in parity_cases([2], ()) if case.accumulation_steps > 1]
    assert len({(case.backend, case.strategy) for case in cases}) == len(cases) == 11
    cases += [ParityCase("zero2", 2, 3, "sgd", compute="bf16"), ParityCase("ddp", 2, 3, "sgd", compute="bf16")]
    assert _failed(config, cases, tmp_path / "out") == []


@pytest.mark.timeout(400)
def test_language_models_distil_as_one_process(teachers: Path, tmp_path: Path) -> None:
    values = tiny_values(tmp_path / "runs", teachers / "cache", teachers / "documents")
    values["optimizer"] = {"lr": 1e-2}
    # With padding of the vocabulary and recomputation of the student's, which the teacher has not.
    values["model"] = values["model"] | {"vocab_multiple": 16}
    values["activation_checkpointing"] = {"mode": "full"}
    distill = {"teacher": str(teachers / "exported"), "weight": 0.8, "temperature": 3.0, "layers": [[0, 1], [2, 2]]}
    config = parse_config(values | {"distill": distill}, "test")
    cases = [ParityCase(strategy, 2, 3, "sgd") for strategy in ("ddp", "zero1", "zero3")]
    cases += [ParityCase("zero3", 2, 3, "sgd", "bucketed"), ParityCase("zero3", 2, 1, "sgd", "deepspeed")]
    assert _failed(config, cases, tmp_path / "out") == []


@pytest.mark.timeout(400)
def test_an_lstm_distils_a_transformer_as_one_process(teachers: Path, tmp_path: Path) -> None:
    lstm = {"builtin": "lstm", "arguments": {"embedding_size": 6, "hidden_size": 16, "mean_embedding": False}}
    # As wide in both directions as the teacher, whose padding counts nowhere.
    distill = {"teacher": str(teachers / "runs" / "texts"), "layers": [[-1, 0]]}
    config = parse_config(text_values(teachers, "student", lstm, distill=distill), "test")
    assert _failed(config, [ParityCase("zero3", 2, 3, "sgd", "bucketed")], tmp_path / "out") == []


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_compiled_students_do_so_too(teachers: Path, tmp_path: Path) -> None:
    values = tiny_values(tmp_path / "runs", teachers / "cache", teachers / "documents")
    values |= {"optimizer": {"lr": 1e-2}, "compile": {"enabled": True}}
    config = parse_config(values | {"distill": {"teacher": str(teachers / "exported")}}, "test")
    cases = [ParityCase("zero3", 2, 3, "sgd"), ParityCase("ddp", 2, 3, "sgd")]
    assert _failed(config, cases, tmp_path / "out") == []


@pytest.mark.timeout(400)
def test_a_masked_model_distils_as_one_process(teachers: Path, tmp_path: Path) -> None:
    values = tiny_values(tmp_path / "runs", teachers / "cache", teachers / "documents")
    values |= {"task": {"name": "masked-lm"}, "optimizer": {"lr": 1e-2}, "data": values["data"] | {"mask_token": True}}
    values["model"] = {
        "architecture": "bert",
        "config": {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2},
    }
    config = parse_config(values | {"distill": {"teacher": f"{teachers / 'runs' / 'bert'}@2"}}, "test")
    assert _failed(config, [ParityCase("zero3", 2, 3, "sgd")], tmp_path / "out") == []


def _run_in_pieces(ranks: Ranks, root: Path, teachers: Path) -> None:
    runs = RunsInProcess(ranks, root, teachers / "documents")
    # A teacher that has saved once more between two looks is to all what it is to rank 0.
    step = 3 if ranks.rank == 0 else 6
    values = tiny_values(root, root, root) | {"distill": {"teacher": f"{teachers / 'runs' / 'llama'}@{step}"}}
    found = _as_rank_0_finds_it(parse_config(values, "test"), ranks).distill.teacher
    assert found == f"{teachers / 'runs' / 'llama'}@3"
    newest = values | {"distill": {"teacher": str(teachers / "runs" / "llama")}}
    assert str(_as_rank_0_finds_it(parse_config(newest, "test"), ranks).distill.teacher).endswith("/llama@6")

    sections: dict[str, Any] = {
        "data": {"cache_dir": str(teachers / "cache")},
        "distill": {"teacher": f"{teachers / 'runs' / 'llama'}@3", "weight": 0.7},
        "parallel": {"strategy": "zero3"},
        "evaluation": {"every_steps": 4, "max_sequences": 6},
    }
    whole = runs.train("whole", steps=8, **sections)
    runs.train("pieces", steps=8, stop_at=6, **sections)
    # The same values by another name.
    moved = {**sections["distill"], "teacher": f"{teachers / 'runs' / '..' / 'runs' / 'llama'}@3"}
    pieces = runs.train("pieces", steps=8, **{**sections, "distill": moved})
    assert computed_lines(pieces) == computed_lines(whole)
    (state, tensors), (expected_state, expected) = saved_state(pieces, 8), saved_state(whole, 8)
    assert state == expected_state
    # The teacher is in no state.
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items())
    assert sum(name.startswith("model/") for name in tensors) == 3 * 9 + 2
    assert json.loads((pieces.path / TEACHER_FILE).read_text())["step"] == 3
    assert "teacher: " in runs.console("pieces")

    another = {**sections, "distill": {**sections["distill"], "teacher": str(teachers / "runs" / "llama")}}
    with pytest.raises(UserError, match=r"was taught by .*llama@3 at step 3 so far, and .* \(.* at step 6\); set "):
        runs.train("pieces", steps=10, **another)

    # Evaluation is the student's own: with a step that changes nothing, what it is without a teacher.
    still = {"optimizer": {"lr": 1e-30}, "data": sections["data"], "parallel": sections["parallel"]}
    taught = runs.train("taught", steps=1, distill=sections["distill"], **still)
    alone = runs.train("alone", steps=1, **still)
    (line,), (other,) = computed_lines(taught), computed_lines(alone)
    assert line["eval/loss"] == other["eval/loss"]
    assert line["train/loss"] != other["train/loss"]


@pytest.mark.timeout(200)
def test_a_run_in_pieces_has_the_teacher_that_it_had(teachers: Path, tmp_path: Path) -> None:
    run_on_ranks(_run_in_pieces, 2, tmp_path, teachers)
    # Whose teacher is gone is finished all the same.
    config = str(tmp_path / "runs" / "taught" / "config.yaml")
    assert launch(config, [f"distill.teacher={tmp_path / 'gone'}"], 2, "torchrun", dry_run=False) == 0
