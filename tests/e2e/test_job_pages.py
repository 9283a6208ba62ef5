"""The pages by job from top to bottom: each command as it is written, in a folder like a reader's, on little data."""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.doc_pages import Page
from tests.support import ROOT, command_environment, from_zygote

_JOBS = ROOT / "docs" / "jobs"
# Behind each command that trains with a configuration: fewer steps, smaller models.
_SMALLER = {
    "mine.yaml": ("model.config.hidden_size=48", "model.config.intermediate_size=96", "data.sequence_length=64"),
    "configs/stdlib_bert_mlm.yaml": (
        *("steps=4", "schedule.total_steps=4", "data.max_documents=60"),
        *("checkpoint.every_steps=2", "evaluation.every_steps=2"),
    ),
    "configs/stdlib_classify_transfer.yaml": ("steps=4", "data.max_documents=400", "schedule.warmup_fraction=0"),
    "configs/chat_lora.yaml": ("steps=4", "data.max_documents=200"),
    "chat.yaml": ("epochs=1", "evaluation.every_steps=0"),
    "configs/quickstart.yaml": ("steps=4", "data.max_documents=60", "data.vocab_size=512"),
}
_SMALL_SEARCH = ("--steps", "1", "--warmup", "0", "--strategies", "ddp", "--no-compile", "--no-recompute")
# Minutes each, or a cluster: tests of their own run them, see tests/test_doc_commands.py.
_ELSEWHERE = ("parity", "slurm", "drill", "doctor", "bench")


def _reader_has(folder: Path) -> None:
    """What the pages say that a reader has: the examples, texts, tables, images."""
    shutil.copytree(ROOT / "configs", folder / "configs", ignore=shutil.ignore_patterns("__pycache__", "*.py"))
    shutil.copytree(ROOT / "docs", folder / "texts")
    draw = random.Random(0)
    for name, rows in (("reviews.csv", 300), ("new-reviews.csv", 40)):
        lines = []
        for number in range(rows):
            label = draw.choice(("good", "bad"))
            words = draw.choices(("fine", "great", "kind") if label == "good" else ("dull", "poor", "sad"), k=6)
            lines.append(f"{' '.join(words)} number {number},{label}")
        (folder / name).write_text("text,label\n" + "\n".join(lines) + "\n")
    lines = []
    for patient in range(300):
        ward, age = draw.choice(("north", "south")), draw.randint(20, 90)
        pressure = "" if patient % 50 == 7 else f"{draw.gauss(120, 15):.1f}"
        lines.append(f"{patient},{age},{pressure},{ward},{'ill' if age + draw.gauss(0, 5) > 60 else 'well'}")
    (folder / "patients.csv").write_text("patient,age,pressure,ward,outcome\n" + "\n".join(lines) + "\n")
    with (folder / "chats.jsonl").open("w") as file:
        for number in range(120):
            messages = [
                {"role": "user", "content": f"What is {number} plus one?"},
                {"role": "assistant", "content": f"It is {number + 1}."},
            ]
            file.write(json.dumps({"messages": messages}) + "\n")
    pixels = np.random.default_rng(0)
    for name, channel in (("cat", 0), ("dog", 2)):
        (folder / "photos" / name).mkdir(parents=True)
        for number in range(60):
            image = pixels.integers(0, 120, (40, 36, 3), dtype=np.uint8)
            image[..., channel] += 100
            Image.fromarray(image).save(folder / "photos" / name / f"{number}.png")


def _arguments(words: list[str]) -> list[str]:
    """Arguments of a command on a smaller scale."""
    verb, *rest = words
    smaller = list(_SMALLER.get(rest[0], ())) if verb in ("run", "tune") else []
    return [verb, *rest, *(_SMALL_SEARCH if verb == "tune" else ()), *smaller]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["pretrain", "fine-tune", "classify", "own-model"])
def test_each_command_works_in_its_place(name: str, tmp_path: Path) -> None:
    page = Page.read(_JOBS / f"{name}.md")
    _reader_has(tmp_path)
    for file, text in page.files.items():
        (tmp_path / file).write_text(text)
    environment = command_environment(SHARDLINE_CACHE=str(tmp_path / "cache"), WANDB_MODE="disabled")
    for program, *words in page.commands():
        assert program == "shardline"
        if words[0] in _ELSEWHERE or "gpt2" in " ".join(words):
            continue
        with from_zygote():
            finished = subprocess.run(
                [sys.executable, "-m", "launcher", *_arguments(words)],
                cwd=tmp_path,
                env=environment,
                capture_output=True,
                text=True,
                timeout=400,
                check=False,
            )
        assert finished.returncode == 0, f"{words}\n{finished.stdout}{finished.stderr}"
