"""Tasks on rows under several engines: losses and metrics on ragged rows as in one process."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from sharding.engine import Batch
from sharding.mesh import build_mesh
from sharding.ranks.object_exchange import sum_over_ranks
from sharding.ranks.process_group import Ranks
from tests.support import run_on_ranks
from trainer.config import parse_config
from trainer.data.facts import SampleFacts
from trainer.data.loader import evaluation_batches
from trainer.model.engine import build_model_engine
from trainer.tasks.evaluation import Evaluation
from trainer.tasks.named_sums import NamedSums
from trainer.tasks.registry import configured_task

_NUM_TRAINED, _NUM_HELD_OUT, _LONGEST = 12, 19, 9
_CLASSES = ("a", "b", "c")
_SIZES = {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 3}
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_BERT: dict[str, Any] = {"architecture": "bert", "config": _SIZES | _NO_DROPOUT}
_LLAMA: dict[str, Any] = {"architecture": "llama", "config": _SIZES}
_CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "texts": ({"name": "sequence-classification", "label_smoothing": 0.1, "class_weights": "balanced"}, _BERT),
    "texts by a decoder": ({"name": "sequence-classification"}, _LLAMA),
    "tags": ({"name": "token-classification"}, _BERT),
    "numbers of texts": ({"name": "regression", "loss": "huber"}, _LLAMA),
    "table": ({"name": "classification"}, {"builtin": "mlp", "arguments": {"hidden_sizes": [7]}}),
    "two classes": (
        {"name": "classification", "loss": "binary-cross-entropy"},
        {"builtin": "mlp", "arguments": {"hidden_sizes": [7]}},
    ),
    "numbers of a table": ({"name": "regression"}, {"builtin": "mlp", "arguments": {"hidden_sizes": [7]}}),
    "images": ({"name": "image-classification"}, {"builtin": "cnn", "arguments": {"channels": [4]}}),
}
_LAYOUTS = [
    (1, "none", "torch"),
    *((2, strategy, "torch") for strategy in ("ddp", "zero3")),
    (2, "zero2", "bucketed"),
    (2, "zero2", "deepspeed"),
    (3, "zero2", "torch"),
]


class _Rows:
    """Rows in memory: ``train`` and ``validation``."""

    fingerprint = "rows"

    def __init__(self, case: str) -> None:
        self._task = _CASES[case][0]["name"]
        generator = torch.Generator().manual_seed(5)
        number = _NUM_TRAINED + _NUM_HELD_OUT
        self._columns: Batch = {}
        tokens: dict[str, Any] = {}
        if "text" in case or case == "tags":
            lengths = torch.randint(1, _LONGEST + 1, (number,), generator=generator)
            ids = torch.randint(1, 40, (number, _LONGEST), generator=generator)
            self._columns = {"input_ids": ids, "num_tokens": lengths}
            tokens = {"sequence_length": _LONGEST, "vocab_size": 40, "pad_token_id": 0}
        elif case == "images":
            self._columns = {"pixel_values": torch.randn(number, 1, 8, 8, generator=generator)}
            tokens = {"image_shape": (1, 8, 8)}
        else:
            self._columns = {"features": torch.randn(number, 5, generator=generator)}
            self._columns["categories"] = torch.zeros(number, 0, dtype=torch.long)
            tokens = {"num_features": 5}
        classes = _CLASSES[:2] if case == "two classes" else _CLASSES
        labels = torch.arange(number) % len(classes)
        if self._task == "regression":
            self._columns["labels"] = 1000 + 3 * torch.randn(number, generator=generator)
            tokens |= {"label_mean": 1000.0, "label_scale": 3.0}
        elif self._task == "token-classification":
            tags = torch.randint(0, len(classes), (number, _LONGEST), generator=generator)
            tags[torch.rand(tags.shape, generator=generator) < 0.3] = -100
            self._columns["labels"] = tags
        else:
            self._columns["labels"] = labels
        counts = tuple(int((labels[:_NUM_TRAINED] == index).sum()) for index in range(len(classes)))
        has_classes = self._task != "regression"
        tokens |= {"classes": classes, "class_counts": counts} if has_classes else {}
        self.facts = SampleFacts(**tokens)

    def num_samples(self, split: str) -> int:
        return {"train": _NUM_TRAINED, "validation": _NUM_HELD_OUT}[split]

    def read(self, split: str, indices: Sequence[int]) -> Batch:
        chosen = torch.tensor(indices) + (0 if split == "train" else _NUM_TRAINED)
        rows = {name: column[chosen].clone() for name, column in self._columns.items()}
        if "num_tokens" in rows:
            longest = int(rows["num_tokens"].max())
            is_padding = torch.arange(longest) >= rows["num_tokens"][:, None]
            rows["input_ids"] = rows["input_ids"][:, :longest].masked_fill(is_padding, 0)
            if rows["labels"].ndim == 2:
                rows["labels"] = rows["labels"][:, :longest].masked_fill(is_padding, -100)
        return rows


def _train_and_evaluate(ranks: Ranks, case: str, strategy: str, backend: str) -> tuple[list[float], dict[str, float]]:
    task_settings, model = _CASES[case]
    rows = _Rows(case)
    values = {
        "steps": 3,
        "task": task_settings,
        "model": model,
        "data": {"sequence_length": _LONGEST},
        "optimizer": {"name": "sgd", "lr": 0.05},
        "batch": {"global_size": _NUM_TRAINED, "micro_size": 2},
        "parallel": {"strategy": strategy, "backend": backend},
    }
    config = parse_config(values, "test", has_rules=False)
    task = configured_task(config.task, rows.facts)
    mesh, named = build_mesh(config.parallel, ranks), NamedSums(task)
    engine, _ = build_model_engine(config, task, mesh, ranks, rows.facts, evaluate=named)
    data = mesh.data
    starts = range(data.rank * 2, _NUM_TRAINED, 2 * data.degree)
    samples = [rows.read("train", [start, start + 1]) for start in starts]
    batches = [
        task.make_batch(s, torch.tensor([i, i + 1]), training=True) for s, i in zip(samples, starts, strict=True)
    ]
    whole = task.make_batch(rows.read("train", range(_NUM_TRAINED)), torch.arange(_NUM_TRAINED), training=True)
    losses = []
    for _ in range(3):
        loss_sum = engine.train_batch(batches, task.num_targets(whole))
        losses.append(sum_over_ranks(loss_sum[None], ranks)[0] / task.num_targets(whole))
        engine.clip_grad_norm(1.0)
        engine.step(0.05)
    evaluation = Evaluation(engine, task, named, ranks, data, seed=1)
    held_out = evaluation_batches(rows, "validation", micro_size=2, dp_rank=data.rank, dp_degree=data.degree)
    metrics = evaluation.metrics(held_out)
    return losses, {name: metric.value for name, metric in metrics.items()}


def _on_ranks(ranks: Ranks, path: Path, layouts: list[tuple[int, str, str]]) -> None:
    found = torch.load(path) if path.exists() else {}
    for _, strategy, backend in layouts:
        for case in _CASES:
            losses, metrics = _train_and_evaluate(ranks, case, strategy, backend)
            expected_losses, expected_metrics = found.setdefault(case, (losses, metrics))
            assert losses[0] != losses[-1]
            assert losses == pytest.approx(expected_losses, rel=2e-6), (case, strategy, backend)
            assert metrics == pytest.approx(expected_metrics, rel=1e-5), (case, strategy, backend)
    if ranks.rank == 0:
        torch.save(found, path)


@pytest.mark.timeout(300)
def test_losses_and_metrics_are_those_of_one_process(tmp_path: Path) -> None:
    for num_ranks in (1, 2, 3):
        layouts = [layout for layout in _LAYOUTS if layout[0] == num_ranks]
        run_on_ranks(_on_ranks, num_ranks, tmp_path / "found", layouts, timeout_s=200)
