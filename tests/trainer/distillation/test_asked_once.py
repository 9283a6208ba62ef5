"""A teacher that is asked once for each sample: what is kept, that training is the same, and what is never taken."""

import json
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sharding.ranks.errors import UserError
from sharding.ranks.process_group import Ranks
from tests.runs_in_process import RunsInProcess, computed_lines, saved_state
from tests.support import run_on_ranks, tiny_values
from tests.trainer.distillation.teachers import row_values, text_values
from trainer.config import parse_config
from trainer.config.rules import validate
from trainer.distillation import asked_once
from trainer.distillation.asked_once import _take
from trainer.distillation.kept_answers import (
    MANIFEST_NAME,
    AnswersKey,
    AnswersManifest,
    KeptAnswers,
    find_answers,
    write_answers,
    write_manifest,
)
from trainer.distillation.top_k import CLASSES, LOG_PROBABILITIES, kept_answer, kept_bytes, top_k_divergence_sum
from trainer.parity.cases import ParityCase
from trainer.parity.comparison import run_parity
from trainer.run_folder.folder import RunFolder
from trainer.tasks.divergence import divergence_sum

# Without settings of files, which such samples do not have.
_OF_FACTORY = dict.fromkeys(("paths", "vocab_size", "validation_fraction")) | {"source": "factory", "factory": "my:of"}
_OWN_SAMPLES = {"data": _OF_FACTORY, "task": {"name": "sequence-classification"}}
MLP = {"builtin": "mlp", "arguments": {"hidden_sizes": [10, 12]}}


def test_the_divergence_is_that_over_the_likeliest_and_the_rest() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (4 * torch.randn(3, 5, 9, generator=generator) for _ in range(2))
    student.requires_grad_()
    is_target = torch.rand(3, 5, generator=generator) < 0.5
    # Rows that others have made longer.
    kept = {name: torch.cat([column, column[:, :2]], dim=1) for name, column in kept_answer(teacher, 3, 2.0).items()}
    assert kept[LOG_PROBABILITIES].shape == (3, 7, 4)
    assert kept[CLASSES].dtype == torch.int16
    assert sum(column[0, 0].nbytes for column in kept.values()) == kept_bytes(3, 9)
    found = top_k_divergence_sum(student, kept, is_target, 2.0)
    p, q = ((of[is_target].detach().double() / 2).softmax(-1) for of in (teacher, student))
    order = p.argsort(-1, descending=True)
    p, q = (of.gather(-1, order) for of in (p, q))
    p, q = (torch.cat([of[:, :3], of[:, 3:].sum(-1, keepdim=True)], dim=-1) for of in (p, q))
    assert found.item() == pytest.approx(float(4 * (p * (p / q).log()).sum()), rel=1e-5)
    # All classes are no approximation, in value and gradient.
    (whole,) = torch.autograd.grad(divergence_sum(student, teacher, is_target, 2.0), student)
    (of_all,) = torch.autograd.grad(
        top_k_divergence_sum(student, kept_answer(teacher, 99, 2.0), is_target, 2.0), student
    )
    torch.testing.assert_close(of_all, whole, rtol=1e-4, atol=1e-6)
    # A teacher that is sure leaves a rest of nothing, and no NaN.
    sure = torch.where(torch.arange(9) == 4, 1e4, -torch.inf).expand(1, 9)
    (gradient,) = torch.autograd.grad(
        top_k_divergence_sum(student[0, :1], kept_answer(sure, 2, 2.0), torch.ones(1, dtype=torch.bool), 2.0), student
    )
    assert gradient.isfinite().all()
    assert gradient.any()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"distill": {"top_k": 3}}, r"distill\.top_k=3 goes with distill\.teacher only"),
        ({"task": {"name": "masked-lm"}}, r"with task\.name=causal-lm, .*what hides tokens"),
        ({"task": {"name": "my:Task"}}, r"with task\.name=causal-lm, "),
        ({"data": {"streaming": True}}, r"without data\.streaming only"),
        (_OWN_SAMPLES, r"without data\.factory only"),
        ({"distill": {"layers": [[0, 0]]}}, r"without distill\.layers only"),
        ({"distill": {"factory": "my:model"}}, r"without distill\.factory only"),
        ({"steps": None, "stages": [{"name": "a", "steps": 2}, {"name": "b", "steps": 2}]}, r"each stage numbers"),
    ],
)
def test_what_cannot_be_kept_is_refused(changes: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    values = tiny_values(tmp_path, tmp_path, tmp_path)
    teacher = {} if changes.get("distill", {}).keys() == {"top_k"} else {"teacher": "runs/teacher", "top_k": 3}
    changes = {"distill": {}} | changes
    for key, section in changes.items():
        merged = values.get(key, {}) | section if isinstance(section, dict) else section
        values[key] = {name: value for name, value in merged.items() if value is not None} if key == "data" else merged
    values["distill"] |= teacher
    with pytest.raises(UserError, match=sentence):
        validate(parse_config(values, "test"))


def test_what_is_damaged_or_unfinished_is_never_taken(tmp_path: Path) -> None:
    folder = tmp_path / "teacher-0"
    folder.mkdir()
    shape = {"task": "causal-lm", "sources": [], "sequence_length": 2, "document_mask": False, "compute": "float32"}
    key = AnswersKey(teacher="a", samples="b", top_k=2, temperature=1.0, **shape)  # type: ignore[arg-type]
    columns = kept_answer(torch.randn(5, 2, 7, generator=torch.Generator().manual_seed(0)), 2, 1.0)
    parts = [{name: column[at : at + 3].contiguous() for name, column in columns.items()} for at in (0, 3)]
    files = [write_answers(folder, number, part) for number, part in enumerate(parts)]
    assert find_answers(folder, key) is None
    manifest = AnswersManifest(key=key, teacher_hash="c", num_samples=5, num_classes=7, samples_per_file=3, files=files)
    write_manifest(folder, manifest)
    assert find_answers(folder, key) == manifest
    rows = [4, 0, 3, 3]
    read = KeptAnswers(folder, manifest, verify=True).read(rows)
    assert all(torch.equal(read[name], column[rows]) for name, column in columns.items())

    path, remedy = folder / files[1].file, "delete the folder, and the same command asks the teacher again"
    contents, of_manifest = path.read_bytes(), (folder / MANIFEST_NAME).read_bytes()
    path.write_bytes(contents[:-3] + b"abc")
    with pytest.raises(UserError, match=f"does not have the SHA-256 of the manifest; {remedy}"):
        KeptAnswers(folder, manifest, verify=True).read([4])
    path.write_bytes(contents[:-3])
    with pytest.raises(UserError, match=rf"answers-000001.safetensors has \d+ bytes instead of \d+; {remedy}"):
        find_answers(folder, key)
    path.unlink()
    with pytest.raises(UserError, match=f"has 0 bytes instead of .*; {remedy}"):
        find_answers(folder, key)
    with pytest.raises(UserError, match=r"cannot be read from this machine \(.*No such file"):
        KeptAnswers(folder, manifest, verify=True).read([4])
    with pytest.raises(UserError, match=f"but they are of another temperature; {remedy}"):
        find_answers(folder, key.model_copy(update={"temperature": 2.0}))
    (folder / MANIFEST_NAME).write_bytes(of_manifest.replace(b'"top_k": 2', b'"top_k": 3'))
    with pytest.raises(UserError, match=f"manifest.json cannot be read .*; {remedy}"):
        find_answers(folder, key)
    # Of one who has ended early nothing is left, and one at work is not disturbed.
    (folder / MANIFEST_NAME).unlink()
    with ExitStack() as lock:
        _take(folder, lock)
        assert list(folder.iterdir()) == []
        with pytest.raises(UserError, match="another run is asking the same teacher about the same samples"):
            _take(folder, ExitStack())
    _take(folder, ExitStack())


def test_sources_in_another_order_are_other_samples(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(asked_once, "find_teacher", lambda _: None)
    monkeypatch.setattr(asked_once, "_teacher_digest", lambda _: "a")
    sources = [{"name": name, "weight": 1} for name in ("one", "two")]
    of_mixture = SimpleNamespace(fingerprint="the same in any order", facts=SimpleNamespace(sequence_length=8))
    values = tiny_values(tmp_path, tmp_path, tmp_path) | {"distill": {"teacher": "a", "top_k": 2}}
    keys = []
    for in_order in (sources, sources[::-1]):
        config = parse_config(values | {"data": {"mixture": in_order, "sequence_length": 8}}, "test")
        keys.append(asked_once._key(config, of_mixture, torch.device("cpu")))  # type: ignore[arg-type]
    assert keys[0].digest != keys[1].digest


def _failed(config: Any, cases: list[ParityCase], folder: Path) -> list[Any]:
    folder.mkdir()
    rows = run_parity(config, cases, folder)
    assert len(rows) == len(cases)
    return [row for row in rows if not row.passed]


@pytest.mark.timeout(400)
def test_every_layout_learns_from_the_likeliest_as_one_process(teachers: Path, tmp_path: Path) -> None:
    values = tiny_values(tmp_path / "runs", teachers / "cache", teachers / "documents")
    distill = {"teacher": str(teachers / "exported"), "weight": 0.8, "temperature": 3.0, "top_k": 5}
    config = parse_config(values | {"optimizer": {"lr": 1e-2}, "distill": distill}, "test")
    cases = [ParityCase(strategy, 2, 3, "sgd") for strategy in ("ddp", "zero3")]
    cases += [ParityCase("none", 1, 4, "sgd"), ParityCase("zero3", 2, 3, "sgd", "bucketed")]
    assert _failed(config, cases, tmp_path / "texts") == []
    lstm = {"builtin": "lstm", "arguments": {"embedding_size": 6, "hidden_size": 9}}
    distill = {"teacher": str(teachers / "runs" / "texts"), "top_k": 2}
    config = parse_config(text_values(teachers, "student", lstm, distill=distill), "test")
    assert _failed(config, cases[1:2], tmp_path / "rows") == []


def _same(one: RunFolder, other: RunFolder, step: int) -> None:
    """Assert that losses and every tensor are the same bit for bit."""
    assert computed_lines(other) == computed_lines(one)
    (state, tensors), (expected_state, expected) = saved_state(other, step), saved_state(one, step)
    assert state == expected_state
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items())


def _close(one: RunFolder, other: RunFolder, step: int) -> None:
    lines = zip(computed_lines(one), computed_lines(other), strict=True)
    assert all(line["train/loss"] == pytest.approx(its["train/loss"], rel=1e-5) for line, its in lines)
    tensors, others = saved_state(one, step)[1], saved_state(other, step)[1]
    for name, tensor in tensors.items():
        if name.startswith("model/"):
            torch.testing.assert_close(tensor, others[name], rtol=0, atol=1e-5)


def _answers(cache: Path) -> list[Path]:
    return sorted(manifest.parent for manifest in cache.glob(f"*/teacher-*/{MANIFEST_NAME}"))


def _train_by_what_is_kept(ranks: Ranks, root: Path, teachers: Path) -> None:
    runs = RunsInProcess(ranks, root, teachers / "documents")
    teacher = {"teacher": f"{teachers / 'runs' / 'llama'}@3", "weight": 0.7}
    # What is compared in value moves by plain steps.
    optimizer = {"name": "sgd", "lr": 0.1}
    shared: dict[str, Any] = {"data": {"cache_dir": str(teachers / "cache")}, "optimizer": optimizer}
    zero3 = shared | {"parallel": {"strategy": "zero3"}}
    live = runs.train("live", steps=5, distill=teacher, **zero3)
    # More classes than there are: all.
    kept_of_all = runs.train("all", steps=5, distill=teacher | {"top_k": 100_000}, **zero3)
    _close(kept_of_all, live, 5)
    assert "asked once for each of" in runs.console("all")
    assert len(_answers(teachers / "cache")) == 1

    few = teacher | {"top_k": 4}
    whole = runs.train("whole", steps=5, distill=few, **zero3)
    assert computed_lines(whole) != computed_lines(live)
    runs.train("pieces", steps=5, stop_at=4, distill=few, **zero3)
    # Nobody asks again: under another strategy the student has read the very same answers.
    times = {path: path.stat().st_mtime_ns for one in _answers(teachers / "cache") for path in one.iterdir()}
    pieces = runs.train("pieces", steps=5, distill=few, **zero3)
    _same(whole, pieces, 5)
    _close(runs.train("ddp", steps=5, distill=few, **shared | {"parallel": {"strategy": "ddp"}}), whole, 5)
    assert times == {path: path.stat().st_mtime_ns for one in _answers(teachers / "cache") for path in one.iterdir()}
    assert len(_answers(teachers / "cache")) == 2
    assert "asked once" not in runs.console("ddp")
    # The teacher is another one than before.
    newest = few | {"teacher": str(teachers / "runs" / "llama")}
    with pytest.raises(UserError, match=r"was taught by .*llama@3 at step 3 so far"):
        runs.train("whole", steps=10, distill=newest, **zero3)
    # It was refused before it was asked.
    assert len(_answers(teachers / "cache")) == 2

    for case in ("digits", "texts"):
        _classify(runs, teachers, case)
    # Files without a manifest are none: all is asked again, and is the same.
    folder = next(one for one in _answers(teachers / "cache") if _top_k(one) == 4)
    first, contents = sorted(folder.glob("*.safetensors"))[0], {path: path.read_bytes() for path in folder.iterdir()}
    torch.distributed.barrier()
    if ranks.rank == 0:
        first.write_bytes(b"half")
        (folder / MANIFEST_NAME).unlink()
    torch.distributed.barrier()
    _same(whole, runs.train("again", steps=5, distill=few, **zero3), 5)
    assert contents == {path: path.read_bytes() for path in folder.iterdir()}


def _top_k(folder: Path) -> int:
    return int(json.loads((folder / MANIFEST_NAME).read_text())["key"]["top_k"])


def _classify(runs: RunsInProcess, teachers: Path, case: str) -> None:
    """A student of rows learns of all classes what a teacher says that is asked in each step."""
    make = row_values if case == "digits" else text_values
    model = MLP if case == "digits" else {"builtin": "lstm", "arguments": {"embedding_size": 6, "hidden_size": 9}}
    sections: dict[str, Any] = {"optimizer": {"name": "sgd", "lr": 0.1}, "parallel": {"strategy": "ddp"}}
    folders = []
    for name, kept in (("live", {}), ("kept", {"top_k": 64})):
        teacher = {"teacher": str(teachers / "runs" / ("cnn" if case == "digits" else "texts"))}
        values = make(runs.root, f"{case}-{name}", model, distill=teacher | kept, **sections)
        # As the teacher's, which has another normalisation.
        data = values["data"] | {"cache_dir": str(teachers / "cache")}
        data |= {"validation_fraction": 0.5} if case == "digits" else {"bucket_by_length": True}
        folders.append(runs.train_as(parse_config(values | {"data": data, "steps": 4}, name)))
    _close(folders[1], folders[0], 4)


@pytest.mark.timeout(400)
def test_training_by_what_is_kept_is_the_same(teachers: Path, tmp_path: Path) -> None:
    run_on_ranks(_train_by_what_is_kept, 2, tmp_path, teachers)
