"""Who may import whom, and what is not loaded before it is needed."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT, command_environment, shardline, tiny_values, write_config

# Each package, and those of ours that it may not know.
FORBIDDEN = {
    "sharding": {"trainer", "launcher", "benchmarks", "tests"},
    "trainer": {"launcher", "benchmarks", "tests"},
    "launcher": {"benchmarks", "tests"},
    "benchmarks": {"launcher", "tests"},
}
HEAVY = {"torch", "transformers", "datasets", "wandb", "deepspeed", "accelerate", "tokenizers", "safetensors"}
UNUSED_BY_A_RANK = {"datasets", "wandb", "deepspeed", "accelerate", "pandas", "pyarrow"}


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


@pytest.mark.parametrize("package", FORBIDDEN)
def test_imports_go_one_way(package: str) -> None:
    files = list((ROOT / package).rglob("*.py"))
    assert files
    wrong = {
        str(path.relative_to(ROOT)): found
        for path in files
        if (found := _imported(path.read_text()) & FORBIDDEN[package])
    }
    assert wrong == {}


def test_imports_inside_functions_are_seen() -> None:
    assert _imported("def f():\n    from trainer.loop import Trainer\n    import launcher.run as run") == {
        "trainer",
        "launcher",
    }


def test_the_launcher_loads_nothing_heavy() -> None:
    modules = [f"launcher.{path.stem}" for path in (ROOT / "launcher").glob("*.py") if not path.stem.startswith("__")]
    assert "launcher.cli" in modules
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
