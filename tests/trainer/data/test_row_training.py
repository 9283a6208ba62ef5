"""Runs on rows: prepared, trained, stopped, continued, shown, exported."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from sharding.ranks.process_group import Ranks
from tests.runs_in_process import RunsInProcess, computed_lines, saved_state
from tests.support import run_on_ranks, shardline, trained, write_config
from tests.trainer.tasks.own_row_task import MODEL
from trainer.checkpoint.reader import CheckpointReader
from trainer.config import parse_config
from trainer.data.prepare import prepare_samples
from trainer.data.prepared_rows import PreparedRows
from trainer.deploy.allowed_code import AllowedCode
from trainer.deploy.export import export_model
from trainer.run_folder.folder import RunFolder

_WORDS = {"sea": ("wave", "salt", "ship"), "land": ("tree", "hill", "road"), "sky": ("cloud", "star", "wind")}


def _write_rows(path: Path, num_rows: int = 90) -> Path:
    with path.open("w") as file:
        for number in range(num_rows):
            name, words = list(_WORDS.items())[number % 3]
            text = " ".join(words[(number // 3 + i) % 3] for i in range(2 + number % 11)) + f" {number}"
            file.write(json.dumps({"text": text, "label": name}) + "\n")
    return path


def _values(root: Path, **data: Any) -> dict[str, Any]:
    return {
        "name": "rows",
        "steps": 6,
        "seed": 7,
        "output_dir": str(root / "runs"),
        "task": {"name": "tests.trainer.tasks.own_row_task:ClassifiesTexts"},
        "model": MODEL,
        "data": {
            "format": "rows",
            "source": "jsonl",
            "paths": [str(_write_rows(root / "rows.jsonl"))],
            "vocab_size": 300,
            "sequence_length": 24,
            "validation_fraction": 0.2,
            "cache_dir": str(root / "cache"),
            **data,
        },
        "batch": {"global_size": 12, "micro_size": 2},
        "optimizer": {"lr": 1e-2},
        "schedule": {"total_steps": 12},
        "parallel": {"strategy": "zero2"},
        "metrics": {"every_steps": 1},
        "evaluation": {"every_steps": 3},
        "checkpoint": {"every_steps": 3, "keep_last": 0},
        "tracking": {"wandb": {"mode": "disabled"}},
    }


def _train(ranks: Ranks, root: Path) -> None:
    """Six steps at once, six steps with a stop after three, and six with rows of like length together."""
    runs = RunsInProcess(ranks, root, root)
    values = _values(root)
    runs.train_as(parse_config(values | {"name": "whole"}, "whole"))
    stopped = parse_config(values | {"name": "stopped"}, "stopped")
    runs.train_as(stopped, stop_at=4)
    runs.train_as(stopped)
    folder = root / f"notes-{ranks.world_size}"
    folder.mkdir(exist_ok=True)
    task = values["task"] | {"options": {"folder": str(folder)}}
    data = values["data"] | {"bucket_by_length": True}
    runs.train_as(parse_config(values | {"name": "bucketed", "task": task, "data": data}, "bucketed"))


@pytest.fixture(scope="module")
def trained_on(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Folders of the same runs on one rank, on two and on three."""
    folders = {num_ranks: tmp_path_factory.mktemp(f"ranks-{num_ranks}") for num_ranks in (1, 2, 3)}
    for num_ranks, folder in folders.items():
        run_on_ranks(_train, num_ranks, folder)
    return folders


def _curve(folder: Path, name: str, metric: str = "train/loss") -> list[float]:
    lines = computed_lines(RunFolder(folder / "runs" / name))
    return [line[metric] for line in lines if metric in line]


def test_training_does_not_depend_on_the_number_of_ranks(trained_on: dict[int, Path]) -> None:
    losses = _curve(trained_on[1], "whole")
    assert len(losses) == 6
    assert losses[-1] < losses[0] - 0.05
    for metric, count in (("train/loss", 6), ("eval/loss", 2), ("eval/accuracy", 2)):
        expected = _curve(trained_on[1], "whole", metric)
        assert len(expected) == count
        for num_ranks in (2, 3):
            assert _curve(trained_on[num_ranks], "whole", metric) == pytest.approx(expected, rel=1e-5)


def test_a_stopped_run_continues_bit_for_bit(trained_on: dict[int, Path]) -> None:
    whole, stopped = (RunFolder(trained_on[2] / "runs" / name) for name in ("whole", "stopped"))
    assert computed_lines(stopped) == computed_lines(whole)
    (training, tensors), (other, others) = saved_state(whole, 6), saved_state(stopped, 6)
    assert training == other
    assert all(tensors[name].equal(others[name]) for name in tensors)


def test_rows_of_like_length_in_a_micro_batch_train_the_same(trained_on: dict[int, Path]) -> None:
    for num_ranks, folder in trained_on.items():
        assert _curve(folder, "bucketed") == pytest.approx(_curve(folder, "whole"), rel=1e-5)
        notes = [
            json.loads(line)
            for path in sorted((folder / f"notes-{num_ranks}").iterdir())
            for line in path.read_text().splitlines()
        ]
        # Six steps of twelve rows, each row once.
        assert sorted(position for note in notes for position in note["positions"]) == list(range(72))
        widths = [max(note["lengths"]) - min(note["lengths"]) for note in notes]
        assert np.mean(widths) < 2


def test_a_checkpoint_tells_how_rows_are_read(trained_on: dict[int, Path], tmp_path: Path) -> None:
    reader = CheckpointReader(trained_on[2] / "runs" / "whole" / "checkpoints" / "step-00000006")
    reader.verify()
    recipe = reader.read_recipe()
    assert recipe is not None
    assert recipe.classes == ["land", "sea", "sky"]
    prepared = prepare_samples(parse_config(reader.manifest.config, "the checkpoint").data, progress=False)
    assert isinstance(prepared, PreparedRows)
    assert prepared.recipe == recipe
    assert prepared.fingerprint == reader.manifest.data_fingerprint
    export_model(reader, tmp_path / "exported", allowed=AllowedCode(reader.manifest.config["task"]["name"]))
    assert json.loads((tmp_path / "exported" / "rows.json").read_text())["classes"] == recipe.classes
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "exported")
    assert model.config.num_labels == 3
    assert len(AutoTokenizer.from_pretrained(tmp_path / "exported")) == recipe.vocab_size


def test_a_run_prepares_trains_and_shows_its_rows(tmp_path: Path) -> None:
    config = write_config(tmp_path / "run.yaml", _values(tmp_path))
    finished = shardline("run", config, "--nproc-per-node", 2, "steps=3")
    trained(finished)
    assert "classes     3 in training" in finished.stdout
    shown = shardline("data", "show", tmp_path / "runs" / "rows", "--step", 2)
    assert shown.returncode == 0, shown.stderr
    titles = [line for line in shown.stdout.splitlines() if line.startswith("step 2, sample")]
    assert [title.split("position ")[1].split(",")[0] for title in titles] == [str(i) for i in range(12, 24)]
    assert "label sea" in shown.stdout
    assert "wave" in shown.stdout
