"""docs/jobs/coming-from.md: what it says that settings of other trainers are called is what they are called."""

import ast
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.support import ROOT

_PAGE = (ROOT / "docs" / "jobs" / "coming-from.md").read_text()


def _theirs(heading: str) -> set[str]:
    """Names in the first column of the table under a heading."""
    section = _PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| `")][1:]
    assert len(rows) > 6
    return {name for row in rows for name in re.findall(r"`([\w.]+)`", row.split(" | ")[0])}


def _source(package: str, file: str) -> Path:
    # Found without being imported, which would take seconds.
    spec = find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / file


def _class(package: str, file: str, name: str) -> ast.ClassDef:
    body = ast.parse(_source(package, file).read_text()).body
    return next(node for node in body if isinstance(node, ast.ClassDef) and node.name == name)


def test_those_of_transformers() -> None:
    fields = _class("transformers", "training_args.py", "TrainingArguments").body
    known = {node.target.id for node in fields if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)}
    assert _theirs("transformers' Trainer") - known == set()


def test_those_of_accelerate() -> None:
    methods = [
        node for node in _class("accelerate", "accelerator.py", "Accelerator").body if isinstance(node, ast.FunctionDef)
    ]
    arguments = next(method.args for method in methods if method.name == "__init__")
    known = {argument.arg for argument in arguments.args} | {method.name for method in methods}
    assert _theirs("Accelerate") - known == set()


def test_those_of_deepspeed() -> None:
    files = (
        "runtime/constants.py",
        "runtime/precision_config.py",
        "runtime/zero/config.py",
        "runtime/zero/offload_config.py",
    )
    source = "\n".join(_source("deepspeed", file).read_text() for file in files)
    missing = [
        name
        for name in _theirs("DeepSpeed")
        if not re.search(rf"""["']{name}["']|^    {name}: """, source, re.MULTILINE)
    ]
    assert missing == []


@pytest.mark.parametrize(
    ("file", "claim"),
    [
        # A mean of means, unless the model or a loss of one's own divides by the tokens of the batch.
        ("transformers/trainer.py", "loss = loss / self.current_gradient_accumulation_steps"),
        ("accelerate/accelerator.py", "loss = loss / self.gradient_accumulation_steps"),
        ("deepspeed/runtime/engine.py", "loss / self.gradient_accumulation_steps() if scale_wrt_gas else loss"),
        # The first step of a warm-up has rate 0.
        ("transformers/optimization.py", "return float(current_step) / float(max(1, num_warmup_steps))"),
        # A prepared scheduler steps once for each process.
        ("accelerate/scheduler.py", "for _ in range(num_processes):"),
        # A warm-up that is not linear.
        ("deepspeed/runtime/lr_schedules.py", "warmup_type: str = WARMUP_LOG_RATE"),
    ],
)
def test_what_it_says_of_their_arithmetic(file: str, claim: str) -> None:
    package, _, path = file.partition("/")
    assert claim in _source(package, path).read_text()
