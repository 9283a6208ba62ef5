"""Teachers for tests: a few steps of small models, as runs and as an exported folder."""

import json
from pathlib import Path
from typing import Any

from sharding.ranks.process_group import Ranks
from tests.runs_in_process import RunsInProcess
from trainer.checkpoint.reader import open_checkpoint
from trainer.config import parse_config
from trainer.deploy.export import export_model

DIGITS: dict[str, Any] = {"source": "digits", "validation_fraction": 0.1}
CNN = {"builtin": "cnn", "arguments": {"channels": [3, 4], "hidden_sizes": [12], "batch_norm": True, "dropout": 0.2}}
BERT = {
    "architecture": "bert",
    "config": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4},
}
LLAMA = {
    "architecture": "llama",
    "config": {
        "hidden_size": 30,
        "intermediate_size": 44,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
    },
}
"""As wide as the tiny model, and of other blocks."""


def row_values(root: Path, name: str, model: dict[str, Any], **sections: Any) -> dict[str, Any]:
    """Settings of a run on scikit-learn's digits."""
    values = {
        "name": name,
        "steps": 4,
        "task": {"name": "image-classification"},
        "model": model,
        "data": DIGITS | {"cache_dir": str(root / "cache")},
        "batch": {"global_size": 32, "micro_size": 16},
        "optimizer": {"lr": 1e-2},
        "parallel": {"strategy": "none"},
        "output_dir": str(root / "runs"),
        "metrics": {"every_steps": 1},
        "tracking": {"wandb": {"mode": "disabled"}},
    }
    return values | sections


_WORDS = ["import", "return", "class", "while", "except", "lambda", "yield"]


def text_values(root: Path, name: str, model: dict[str, Any], **sections: Any) -> dict[str, Any]:
    """Settings of a run on texts of several lengths, of three classes."""
    file = root / "texts.jsonl"
    lines = [{"text": " ".join(_WORDS[i % 5 : i % 5 + 1 + i % 3]), "label": _WORDS[i % 3]} for i in range(60)]
    if not file.exists():
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = {"source": "jsonl", "paths": [str(file)], "vocab_size": 300, "sequence_length": 32}
    task = {"name": "sequence-classification"}
    texts = {"task": task, "data": data | {"cache_dir": str(root / "cache"), "validation_fraction": 0.2}}
    return row_values(root, name, model, steps=2, **texts, **sections)


def train_teachers(ranks: Ranks, root: Path, corpus: Path) -> None:
    """Train ``runs/cnn``, ``runs/texts``, ``runs/llama`` of two checkpoints, and ``runs/bert``; export ``exported``."""
    runs = RunsInProcess(ranks, root, corpus)
    runs.train_as(parse_config(row_values(root, "cnn", CNN), "cnn"))
    runs.train_as(parse_config(text_values(root, "texts", BERT), "texts"))
    alone = {"parallel": {"strategy": "none"}, "batch": {"micro_size": 12}}
    runs.train("llama", steps=6, model=LLAMA, **alone)
    masks = {"task": {"name": "masked-lm"}, "data": {"mask_token": True}}
    runs.train("bert", steps=2, model=BERT, checkpoint={"every_steps": 0}, **alone, **masks)
    export_model(open_checkpoint(str(root / "runs" / "llama"), None), root / "exported")
