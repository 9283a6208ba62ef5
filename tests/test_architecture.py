"""What the code promises about itself: who may import whom, what is loaded when, and how files are cut."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import ROOT, command_environment, shardline, tiny_values, write_config

# Each of our packages, and those of ours that it may import.
ALLOWED = {
    "sharding": {"sharding"},
    "trainer": {"trainer", "sharding"},
    "launcher": {"launcher", "trainer", "sharding"},
    "benchmarks": {"benchmarks", "trainer", "sharding"},
}
OURS = {*ALLOWED, "tests"}
HEAVY = {"torch", "transformers", "datasets", "wandb", "deepspeed", "accelerate", "tokenizers", "safetensors"}
# Accelerate is not among them, since transformers loads it wherever it is installed; nor is plotly, for the report.
UNUSED_BY_A_RANK = {
    "datasets",
    "wandb",
    "deepspeed",
    "tensorboard",
    "trackio",
    "pandas",
    "pyarrow",
    "launcher",
    "benchmarks",
}


def _sources(package: str) -> Iterator[Path]:
    files = list((ROOT / package).rglob("*.py"))
    assert files
    yield from files


def _imported(source: str) -> set[str]:
    """Top-level names of every module that a source imports anywhere, also inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names.add((node.module or "").partition(".")[0])
    return names


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_go_one_way(package: str) -> None:
    forbidden = OURS - ALLOWED[package]
    wrong = {path: found for path in _sources(package) if (found := _imported(path.read_text()) & forbidden)}
    assert wrong == {}


def test_imports_inside_functions_are_seen() -> None:
    source = "def f():\n    from trainer.loop import Trainer\n    import launcher.run as run"
    assert _imported(source) == {"trainer", "launcher"}


def _loaded_by(statement: str) -> set[str]:
    """Top-level modules that a fresh interpreter has after a statement."""
    finished = subprocess.run(
        [sys.executable, "-c", f"{statement}; import sys; print(*sys.modules)"],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
        env=command_environment(),
        check=True,
    )
    return {name.partition(".")[0] for name in finished.stdout.split()}


def test_the_launcher_loads_nothing_heavy() -> None:
    paths = [path.relative_to(ROOT) for path in _sources("launcher") if not path.stem.startswith("__")]
    modules = [".".join(path.with_suffix("").parts) for path in paths]
    assert {"launcher.cli", "launcher.commands", "launcher.run"} <= set(modules)
    assert _loaded_by(f"import {', '.join(modules)}") & HEAVY == set()


def test_configuration_loads_nothing_heavy() -> None:
    assert _loaded_by("import trainer.config, trainer.config_docs, trainer.run_folder") & HEAVY == set()


@pytest.mark.timeout(240)
def test_a_rank_loads_only_what_it_uses(tmp_path: Path, shared_corpus: tuple[Path, Path]) -> None:
    corpus, cache = shared_corpus
    config = write_config(tmp_path / "run.yaml", tiny_values(tmp_path / "runs", cache, corpus))
    prepared = shardline("data", "prepare", config)
    assert prepared.returncode == 0, prepared.stderr
    finished = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "trainer", config, "steps=1", "batch.micro_size=12"],
        capture_output=True,
        text=True,
        timeout=200,
        cwd=ROOT,
        env=command_environment(),
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    loaded = set(re.findall(r"^import time:.*\| *(\w+)$", finished.stderr, flags=re.MULTILINE))
    assert {"torch", "transformers", "trainer"} <= loaded
    assert loaded & UNUSED_BY_A_RANK == set()


def test_files_stay_small() -> None:
    long = {path for package in ALLOWED for path in _sources(package) if len(path.read_text().splitlines()) > 400}
    assert long == set()


def test_nothing_is_called_like_a_library() -> None:
    taken = {"torch", "deepspeed", "accelerate", "datasets", "transformers", "wandb", "utils"}
    paths = (path for package in OURS for path in (ROOT / package).rglob("*") if "__pycache__" not in path.parts)
    assert [path for path in paths if path.stem in taken] == []
