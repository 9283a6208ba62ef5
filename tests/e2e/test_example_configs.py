"""Every example configuration that needs neither a GPU nor a download: it fits two ranks, trains, and learns."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from sharding.ranks.process_group import Ranks
from tests.runs_in_process import RunsInProcess
from tests.support import ROOT, read_metrics, run_on_ranks
from trainer.checkpoint.reader import open_checkpoint
from trainer.config import load_config
from trainer.config.rules import World, validate
from trainer.deploy.export import export_model

# A download, or a GPU.
_LARGE = {"gpt2_124m", "llama_1b"}
_TRANSFER = "stdlib_classify_transfer"
_CHAT = "chat_lora"
_DISTILL = "distill_digits"
# What each of these begins with.
_BEGIN_ELSEWHERE = {_TRANSFER: "stdlib_bert_mlm", _CHAT: "quickstart"}
EXAMPLES = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml") if path.stem not in _LARGE)

_LATE_PRUNING = ("prune.begin=6", "prune.end=10", "prune.every=2")
# As many steps as show that it learns; what makes texts fewer and models smaller where that is no matter of learning.
_SHORT: dict[str, tuple[int, tuple[str, ...]]] = {
    "chat_lora": (12, ("data.max_documents=400",)),
    "digits_cnn": (20, ()),
    "digits_mlp": (30, ()),
    "prune_digits": (30, ("prune.begin=10", "prune.end=20", "prune.every=5")),
    "prune_stdlib_lm": (
        12,
        (*("data.max_documents=60", "data.vocab_size=512", "data.sequence_length=32"), *_LATE_PRUNING),
    ),
    "distill_digits": (30, ()),
    "quickstart": (8, ("data.max_documents=60", "data.vocab_size=512", "data.sequence_length=32")),
    "ratings": (60, ()),
    "stdlib_bert_mlm": (16, ("data.max_documents=60", "data.vocab_size=512")),
    "stdlib_classify_transfer": (12, ("data.max_documents=400",)),
    "stdlib_lstm": (12, ("data.max_documents=400", "data.vocab_size=512", "data.sequence_length=64")),
    "table_regression": (40, ()),
    "tones_audio": (10, ()),
}


def _short(name: str, root: Path, *overrides: str) -> Any:
    steps, smaller = _SHORT[name]
    config = load_config(
        ROOT / "configs" / f"{name}.yaml",
        [
            *(f"steps={steps}", "schedule.name=constant", "schedule.warmup_steps=0", "schedule.warmup_fraction=0"),
            "schedule.total_steps=0",
            *("metrics.every_steps=1", "evaluation.max_sequences=32", f"evaluation.every_steps={steps}"),
            *("evaluation.patience=0", "evaluation.monitor=loss", "checkpoint.every_steps=0", "checkpoint.keep_best=0"),
            *(f"output_dir={root / 'runs'}", f"data.cache_dir={root / 'cache'}", "tracking.wandb.mode=disabled"),
            *(*smaller, *overrides),
        ],
    )
    return config.model_copy(update={"name": name})


def _train(ranks: Ranks, root: Path) -> None:
    runs = RunsInProcess(ranks, root, root)
    for name in EXAMPLES:
        if name not in (*_BEGIN_ELSEWHERE, _DISTILL):
            runs.train_as(_short(name, root))
    for name, begins_with in _BEGIN_ELSEWHERE.items():
        if ranks.rank == 0:
            export_model(open_checkpoint(str(root / "runs" / begins_with), None), root / begins_with)
        dist.barrier()
        runs.train_as(_short(name, root, f"model.pretrained={root / begins_with}"))
    runs.train_as(_short(_DISTILL, root, f"distill.teacher={root / 'runs' / 'digits_cnn'}"))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Short runs of all of them, one after another on two ranks."""
    root = tmp_path_factory.mktemp("examples")
    run_on_ranks(_train, 2, root, timeout_s=400)
    return root


def test_each_is_known_here() -> None:
    assert sorted(_SHORT) == EXAMPLES


@pytest.mark.parametrize("name", EXAMPLES)
def test_each_fits_two_ranks(name: str) -> None:
    validate(load_config(ROOT / "configs" / f"{name}.yaml"), World(2, has_gpu=False))


def _falls(losses: list[float], to: float = 0.95) -> bool:
    quarter = max(len(losses) // 4, 2)
    return sum(losses[-quarter:]) < to * sum(losses[:quarter])


@pytest.mark.timeout(400)
@pytest.mark.parametrize("name", [name for name in EXAMPLES if name not in _BEGIN_ELSEWHERE])
def test_every_example_trains(root: Path, name: str) -> None:
    lines = read_metrics(root / "runs" / name)
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert len(losses) == _SHORT[name][0]
    assert all(map(math.isfinite, losses))
    assert _falls(losses), losses
    assert math.isfinite(lines[-1]["eval/loss"])


def test_a_classifier_begins_with_what_a_masked_model_has_learnt(root: Path) -> None:
    losses = [line["train/loss"] for line in read_metrics(root / "runs" / _TRANSFER)]
    assert _falls(losses), losses
    assert "new head: " in (root / f"{_TRANSFER}.log").read_text()


def test_a_language_model_learns_to_answer(root: Path) -> None:
    lines = read_metrics(root / "runs" / _CHAT)
    # Adapters beside a model of a few steps have little to build on.
    assert _falls([line["train/loss"] for line in lines if "train/loss" in line], to=0.98)
    assert math.isfinite(lines[-1]["eval/loss"])
