"""Run folders as a release leaves them, kept for ``tests/trainer/checkpoint/test_earlier_releases.py``.

``python tests/data/make_runs.py`` writes ``tests/data/runs_MAJOR_MINOR_PATCH/`` with the code as it stands. What an
earlier release made is never made again: a change of format has to read it.

In that folder ``corpus/`` is what all runs were trained on. Each run was stopped after step 4 of 8 and lies under its
own name. ``undisturbed/NAME.jsonl`` is what training computed at each step of a run that went to step 8 in one piece;
``runs.json`` says which of these a run is compared with. Paths are relative to the folder. Of a run's folder what only
its machine could use is left out: consoles, heartbeats, the report.
"""

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
STOPPED_AFTER = 4

_BASE: dict[str, Any] = {
    "steps": 8,
    "seed": 11,
    "output_dir": ".",
    "model": {
        "architecture": "llama",
        "config": {
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 32,
            "tie_word_embeddings": True,
        },
    },
    "data": {
        "source": "text",
        "paths": ["corpus"],
        "vocab_size": 280,
        "sequence_length": 16,
        "validation_fraction": 0.2,
        "cache_dir": "cache",
    },
    # Two micro-batches a step on two ranks.
    "batch": {"global_size": 12, "micro_size": 3},
    "optimizer": {"lr": 1e-2},
    "schedule": {"name": "cosine", "warmup_steps": 2, "total_steps": 8},
    "metrics": {"every_steps": 1},
    "evaluation": {"every_steps": 2},
    "tracking": {"wandb": {"mode": "disabled"}},
}
_AVERAGED = {"optimizer": {"ema_decay": 0.75}, "metrics": {"gradient_noise_scale": True}}
_STREAMED = {"data": {"streaming": True, "shuffle_window": 5, "sample_documents": 6, "document_mask": True}}
_SCALED = {
    "optimizer": {"name": "muon"},
    # Far below what overflows, so that no machine skips a step; it grows after steps 3 and 6.
    "precision": {"compute": "fp16", "initial_loss_scale": 1024.0, "loss_scale_growth_steps": 3},
}
# Each run, and the one in one piece that it is compared with: the same training, whatever its layout.
_RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "torch-ddp": ("plain", {"parallel": {"strategy": "ddp"}}),
    "torch-zero3": ("plain", {"parallel": {"strategy": "zero3"}}),
    "bucketed-zero2": ("plain", {"parallel": {"strategy": "zero2", "backend": "bucketed"}}),
    "bucketed-zero3": ("plain", {"parallel": {"strategy": "zero3", "backend": "bucketed"}}),
    "deepspeed-zero2": ("plain", {"parallel": {"strategy": "zero2", "backend": "deepspeed"}}),
    "deepspeed-zero3": ("plain", {"parallel": {"strategy": "zero3", "backend": "deepspeed"}}),
    "accelerate-ddp": ("plain", {"parallel": {"strategy": "ddp", "backend": "accelerate"}}),
    "torch-zero2-averaged": ("averaged", {"parallel": {"strategy": "zero2"}, **_AVERAGED}),
    "torch-zero1-scaled": ("scaled", {"parallel": {"strategy": "zero1"}, **_SCALED}),
    "torch-ddp-streamed": ("streamed", {"parallel": {"strategy": "ddp"}, **_STREAMED}),
}
_UNDISTURBED: dict[str, dict[str, Any]] = {
    "plain": {"parallel": {"strategy": "zero1"}},
    "averaged": {"parallel": {"strategy": "zero1"}, **_AVERAGED},
    "scaled": {"parallel": {"strategy": "zero1"}, **_SCALED},
    "streamed": {"parallel": {"strategy": "ddp"}, **_STREAMED},
}
_KEPT = (
    *("config.yaml", "provenance.json", "metrics.jsonl", "events.jsonl", "outcome.json", "goodput.json"),
    *("logs/attempt-1/goodput.json", "logs/attempt-1/rank-0.log", "checkpoints"),
)


def _write_corpus(folder: Path) -> None:
    """Documents with all that cleaning acts on: a double, an empty one, other line ends, composed letters."""
    sentence = "every rank keeps in step and each claim can be checked on a laptop by whoever doubts it"
    words = sentence.split()
    generator = random.Random(3)
    folder.mkdir(parents=True)
    texts = ["\n".join(" ".join(generator.choices(words, k=9)) for _ in range(5 + index)) for index in range(6)]
    texts += [texts[2], "", "Zu\u0308rich, Zürich\r\n" + " ".join(generator.choices(words, k=20))]
    for index, text in enumerate(texts):
        (folder / f"{index}.txt").write_bytes(text.encode())


def _train(folder: Path, name: str, sections: dict[str, Any], stop_after: int | None) -> dict[str, Any]:
    """Train on two ranks with the command; returns the lease as it was meanwhile."""
    values = {"name": name, **_BASE}
    for key, section in sections.items():
        values[key] = {**values.get(key, {}), **section}
    config = folder / f"{name}.yaml"
    # JSON is YAML, for whatever release reads it.
    config.write_text(json.dumps(values))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    if stop_after is not None:
        fault = {"fault": "term", "rank": 0, "step": stop_after, "phase": "train"}
        environment["SHARDLINE_INJECT"] = json.dumps([fault])
    command = [sys.executable, "-m", "launcher", "run", config.name, "--nproc-per-node", "2"]
    lease: dict[str, Any] = {}
    with subprocess.Popen(command, cwd=folder, env=environment) as process:
        while process.poll() is None:
            with contextlib.suppress(FileNotFoundError):
                lease = json.loads((folder / name / "lease.json").read_text())
            time.sleep(0.1)
    assert process.returncode == (0 if stop_after is None else 75), (name, process.returncode)
    return lease


def _keep(run_dir: Path, target: Path, version: str, lease: dict[str, Any]) -> None:
    """Copy what another machine can use of a run's folder."""
    for name in _KEPT:
        source = run_dir / name
        if source.is_dir():
            shutil.copytree(source, target / name)
        elif source.exists():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target / name)
    file = target / "provenance.json"
    provenance = json.loads(file.read_text())
    provenance |= {"argv": ["shardline", *provenance["argv"][1:]], "code": {"distribution_version": version}}
    provenance["hardware"] |= {"platform": "Linux"}
    file.write_text(json.dumps(provenance, indent=2) + "\n")
    if lease:
        lease |= {"host": "node-a", "process_space": "of another boot"}
        (target / "lease.json").write_text(json.dumps(lease))


def main() -> None:
    """Make all runs of this release."""
    version = metadata.version("shardline")
    target = HERE / f"runs_{version.replace('.', '_')}"
    if target.exists():
        sys.exit(f"{target} is there already; a release's runs are made once.")
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        _write_corpus(folder / "corpus")
        shutil.copytree(folder / "corpus", target / "corpus")
        for name, sections in _UNDISTURBED.items():
            _train(folder, name, sections, None)
            lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
            computed = [{k: v for k, v in line.items() if k.startswith(("step", "train/", "eval/"))} for line in lines]
            file = target / "undisturbed" / f"{name}.jsonl"
            file.parent.mkdir(exist_ok=True)
            file.write_text("".join(json.dumps(line) + "\n" for line in computed))
        index = {}
        for name, (undisturbed, sections) in _RUNS.items():
            lease = _train(folder, name, sections, STOPPED_AFTER)
            # One as its machine left it when it lost power: its lease was never given back.
            _keep(folder / name, target / name, version, lease if name == "torch-ddp" else {})
            index[name] = undisturbed
        (target / "runs.json").write_text(json.dumps(index, indent=2) + "\n")


if __name__ == "__main__":
    main()
