"""A run that takes steps of milliseconds and has everything there is to keep."""

from pathlib import Path

from tests.support import tiny_values, write_config, write_corpus


def tiny_config(folder: Path) -> Path:
    """Write its configuration, and its corpus, into a folder; returns the file."""
    corpus = folder / "documents"
    if not corpus.exists():
        write_corpus(corpus)
    text = {"source": "text", "paths": [str(corpus)]}
    values = tiny_values(folder / "runs", folder / "cache", corpus)
    values["model"] = {
        "architecture": "gpt2",
        "config": {"n_embd": 30, "n_layer": 2, "n_head": 3, "n_positions": 64},
    }
    values["data"] |= {
        "source": "python-stdlib",
        "paths": [],
        "mixture": [
            {"name": "few", "weight": 3.0, "max_documents": 1, **text},
            {"name": "many", "weight": 1.0, **text},
        ],
    }
    values["precision"] = {"compute": "fp16", "initial_loss_scale": 2.0**22, "loss_scale_growth_steps": 50}
    values["optimizer"] |= {"ema_decay": 0.99}
    values["evaluation"] = {"every_steps": 12, "max_sequences": 12}
    values["checkpoint"] = {"every_steps": 5, "keep_last": 3}
    values["faults"] = {"max_nonfinite_steps": 50}
    return write_config(folder / "tiny.yaml", values)
