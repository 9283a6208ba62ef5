"""Small runs of every kind of model, trained for two steps in one process group."""

import json
from pathlib import Path
from typing import Any

from sharding.ranks.process_group import Ranks
from tests.runs_in_process import RunsInProcess
from tests.support import write_corpus
from tests.trainer.evaluation.exported_runs import TINY_WAV2VEC2, tokenizer_without_padding, write_texts
from trainer.config import parse_config

_SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_MODERNBERT = {"local_attention": 8}
_GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
LONGEST = 32
OWN = "tests.trainer.deploy.own_network"


def _values(root: Path, name: str, task: str, model: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": name,
        "steps": 2,
        "output_dir": str(root / "runs"),
        "task": {"name": task},
        "model": model,
        "data": {"cache_dir": str(root / "cache")} | data | ({} if "factory" in data else {"validation_fraction": 0.1}),
        "batch": {"global_size": 8, "micro_size": 8},
        "optimizer": {"lr": 0.01},
        "tracking": {"wandb": {"mode": "disabled"}},
    }


def _of(architecture: str, **config: Any) -> dict[str, Any]:
    return {"architecture": architecture, "config": config}


def small_run_values(root: Path) -> dict[str, dict[str, Any]]:
    """Settings of each run by its name; writes what they read."""
    texts: dict[str, Any] = {"source": "jsonl", "sequence_length": LONGEST}
    texts["paths"] = [str(write_texts(root / "texts.jsonl", 120, seed=1))]
    texts["tokenizer"] = str(tokenizer_without_padding(root / "tokenizer"))
    corpus = {"source": "text", "paths": [str(write_corpus(root / "corpus"))], "vocab_size": 301}
    corpus |= {"sequence_length": LONGEST}
    ratings = {"source": "table", "table": "ratings"}
    digits, tones = {"source": "digits"}, {"source": "tones", "max_documents": 48}
    lstm = {"builtin": "lstm", "arguments": {"embedding_size": 8, "hidden_size": 8}}
    image, text, speech = "image-classification", "sequence-classification", "audio-classification"
    runs = {
        "mlp": (image, {"builtin": "mlp", "arguments": {"hidden_sizes": [32], "batch_norm": True}}, digits),
        "cnn": (image, {"builtin": "cnn", "arguments": {"channels": [4, 8], "batch_norm": True}}, digits),
        "lstm": (text, lstm, texts),
        "bert": (text, _of("bert", max_position_embeddings=48, **_SIZES, **_NO_DROPOUT), texts),
        "modernbert": (text, _of("modernbert", **_SIZES, **_MODERNBERT), texts),
        "vit": (image, _of("vit", patch_size=4, **_SIZES), digits),
        "llama": ("causal-lm", _of("llama", num_key_value_heads=1, max_position_embeddings=64, **_SIZES), corpus),
        "gpt2": ("causal-lm", _of("gpt2", **_GPT2), corpus),
        "masked": ("masked-lm", _of("bert", max_position_embeddings=48, **_SIZES), corpus | {"mask_token": True}),
        "decoder": (text, _of("llama", num_key_value_heads=1, **_SIZES), texts),
        "ratings": ("regression", {"builtin": "embedding-mlp", "arguments": {"hidden_sizes": [8]}}, ratings),
        "sounds": (speech, {"builtin": "cnn", "arguments": {"channels": [4, 4]}}, tones),
        "wav2vec2": (speech, _of("wav2vec2", **_SIZES, **TINY_WAV2VEC2), tones),
    }
    runs["own"] = (f"{OWN}:IsAbove", {"factory": f"{OWN}:network"}, {"source": "factory", "factory": f"{OWN}:Pairs"})
    return {name: _values(root, name, *parts) for name, parts in runs.items()}


def train_small_runs(ranks: Ranks, root: Path, changes: dict[str, dict[str, Any]]) -> None:
    """Train some of them; each is the run of its name before a hyphen, with other sections."""
    runs = small_run_values(root)
    for name, sections in changes.items():
        values = runs[name.partition("-")[0]] | {"name": name}
        for key, section in sections.items():
            values[key] = values.get(key, {}) | section
        if "from" in values.get("checkpoint", {}):
            values["checkpoint"]["from"] = str(root / "runs" / values["checkpoint"]["from"])
        RunsInProcess(ranks, root, root).train_as(parse_config(values, name))
    (root / "trained.json").write_text(json.dumps(sorted(changes)))
