"""What a run is evaluated on beside its validation split."""

import json
from pathlib import Path
from typing import Any

import pytest

from sharding.ranks.errors import UserError
from sharding.ranks.process_group import Ranks
from tests.runs_in_process import RunsInProcess, computed_lines
from tests.support import run_module, run_on_ranks, shardline, tiny_values, write_config, write_corpus
from tests.trainer.tasks.own_row_task import MODEL
from trainer.commands.prepare_data import main as prepare_data
from trainer.config import parse_config
from trainer.data.evaluation_sets import describe_trained, prepare_sets
from trainer.data.facts import SampleFacts
from trainer.data.prepare import prepare_corpus
from trainer.run_folder.folder import RunFolder
from trainer.tasks.monitor import check_monitor
from trainer.tasks.registry import configured_task


def _mixture(root: Path) -> dict[str, Any]:
    values = tiny_values(root / "runs", root / "cache", root)
    data = {key: value for key, value in values["data"].items() if key not in ("source", "paths")}
    sources = [
        {"name": name, "weight": 1.0, "source": "text", "paths": [str(root / name)]} for name in ("notes", "code")
    ]
    other = {"name": "other", "source": "text", "paths": [str(root / "other")]}
    evaluation = {"every_steps": 2, "by_source": True, "sets": [other]}
    return values | {"steps": 2, "data": data | {"mixture": sources}, "evaluation": evaluation}


def _rows(root: Path) -> dict[str, Any]:
    task = {"name": "tests.trainer.tasks.own_row_task:ClassifiesTexts"}
    data = {
        "format": "rows",
        "source": "jsonl",
        "paths": [str(root / "train.jsonl")],
        "validation_paths": [str(root / "held-out.jsonl")],
        "vocab_size": 300,
        "sequence_length": 32,
        "cache_dir": str(root / "cache"),
    }
    same = {"name": "same", "source": "jsonl", "paths": [str(root / "held-out.jsonl")]}
    values = tiny_values(root / "runs", root / "cache", root) | {"name": "rows", "steps": 2, "task": task}
    return values | {"model": MODEL, "data": data, "evaluation": {"every_steps": 2, "sets": [same]}}


def _write(root: Path) -> None:
    for number, name in enumerate(("notes", "code", "other")):
        for path in write_corpus(root / name, 10 + 3 * number).iterdir():
            path.write_text(f"{name}\n{path.read_text()}")
    for name, numbers in (("train", range(60)), ("held-out", range(60, 77))):
        rows = [{"text": f"text {i} is {'odd' if i % 2 else 'even'}", "label": i % 2} for i in numbers]
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _train(ranks: Ranks, root: Path) -> None:
    runs = RunsInProcess(ranks, root, root)
    for values in (_mixture(root), _rows(root)):
        runs.train_as(parse_config(values, "test"))


@pytest.fixture(scope="module")
def trained_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root: Path = tmp_path_factory.mktemp("sets")
    _write(root)
    run_on_ranks(_train, 2, root)
    return root


def test_each_source_of_a_mixture_and_each_set_has_its_loss(trained_root: Path) -> None:
    line = computed_lines(RunFolder(trained_root / "runs" / "tiny"))[-1]
    corpus = prepare_corpus(parse_config(_mixture(trained_root), "test").data, progress=False)
    targets = {part.name: part.stream("validation").num_tokens - 1 for part in corpus.corpora}
    assert min(targets.values()) > 0
    mean = sum(line[f"eval/{name}/loss"] * count for name, count in targets.items()) / sum(targets.values())
    assert line["eval/loss"] == pytest.approx(mean, rel=1e-6)
    assert line["eval/notes/loss"] != line["eval/code/loss"]
    assert 4 < line["eval/other/loss"] < 6
    assert line["eval/other/perplexity"] > 1


def test_rows_of_a_set_are_read_as_those_that_are_trained_on(trained_root: Path) -> None:
    line = computed_lines(RunFolder(trained_root / "runs" / "rows"))[-1]
    assert line["eval/same/loss"] == pytest.approx(line["eval/loss"], rel=1e-6)
    assert line["eval/same/accuracy"] == line["eval/accuracy"]


def test_a_set_that_cannot_be_read_is_said_before_ranks_start(trained_root: Path, tmp_path: Path) -> None:
    values = _rows(trained_root) | {"name": "refused"}
    (tmp_path / "bad.jsonl").write_text(json.dumps({"text": "x", "label": "7"}) + "\n")
    values["evaluation"]["sets"][0]["paths"] = [str(tmp_path / "bad.jsonl")]
    refused = shardline("run", write_config(tmp_path / "run.yaml", values), "--nproc-per-node", 2)
    assert refused.returncode == 2
    said = refused.stderr.strip().splitlines()[-1]
    assert "evaluation.sets same: data.label=label: " in said
    assert "is of the class 7, which no training row has" in said
    assert not (trained_root / "runs" / "refused" / "logs").exists()


def test_documents_of_a_set_that_are_trained_on_are_counted_and_said(
    trained_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = _mixture(trained_root)
    clean = parse_config(values, "test")
    corpus = prepare_corpus(clean.data, progress=False)
    assert describe_trained(prepare_sets(clean, corpus, progress=False), corpus) == []
    trained = {span.source_id for part in corpus.corpora for span in part.stream("train").documents_between(0, 10**9)}
    held_out = sorted({str(path) for name in ("notes", "code") for path in (trained_root / name).iterdir()} - trained)
    assert held_out
    leaking = tmp_path / "leaking"
    leaking.mkdir()
    for number, path in enumerate([*sorted(trained)[:1], *sorted(trained)[-2:], held_out[0]]):
        (leaking / f"{number}.txt").write_text(Path(path).read_text() + "\n" * (number == 2))
    values["evaluation"]["sets"][0]["paths"] = [str(leaking)]
    config = write_config(tmp_path / "leaking.yaml", values | {"name": "leaking", "steps": 1})
    assert prepare_data([str(config)]) == 0
    # One of them ends in another way.
    sentence = (
        "evaluation.sets other: 2 of its 4 documents are among those that are trained on, so that its metrics are "
    )
    assert f"note: {sentence}" in capsys.readouterr().out
    finished = run_module("trainer", config, "batch.micro_size=12", "parallel.strategy=none")
    assert finished.returncode == 0, finished.stderr
    assert sentence in finished.stdout + finished.stderr


def test_a_set_can_be_what_is_best(tmp_path: Path) -> None:
    values = _mixture(tmp_path)
    task = configured_task(parse_config(values, "test").task, SampleFacts(32, 300, 0))
    for monitor in ("loss", "other/loss", "notes/perplexity"):
        values["evaluation"] |= {"monitor": monitor, "patience": 2}
        check_monitor(parse_config(values, "test"), task)
    values["evaluation"]["monitor"] = "web/loss"
    with pytest.raises(UserError, match=r"evaluation.monitor=web/loss is no metric"):
        check_monitor(parse_config(values, "test"), task)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"source": "digits"}, "evaluation.sets a: its source=digits has other samples than data.source=jsonl"),
        ({"source": "jsonl"}, "evaluation.sets a.source=jsonl needs evaluation.sets a.paths"),
        ({"name": "b", "source": "text", "paths": ["x"]}, "evaluation.sets: b is the name of another one of them too"),
    ],
)
def test_sets_that_do_not_fit(tmp_path: Path, change: dict[str, Any], sentence: str) -> None:
    values = _rows(tmp_path)
    values["evaluation"]["sets"] = [{"name": "a"} | change, {"name": "b", "source": "text", "paths": ["y"]}]
    with pytest.raises(UserError, match=sentence):
        parse_config(values, "test")
