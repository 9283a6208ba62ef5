"""What the code promises about itself: who may import whom, what is loaded when, and how files are cut."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.support import ROOT, command_environment, shardline, tiny_values, write_config

# Each of our packages, and those of ours that it may import.
ALLOWED = {
    "sharding": {"sharding"},
    "trainer": {"trainer", "sharding"},
    "launcher": {"launcher", "trainer", "sharding"},
    "benchmarks": {"benchmarks", "trainer", "sharding"},
    "shardline": {"shardline", "trainer", "sharding"},
}
OURS = {*ALLOWED, "tests"}
# The rooms of a package, each with those that it may import: only ones above it here. "." is the package's own folder.
ROOMS: dict[str, dict[str, set[str]]] = {
    "trainer": {
        "config": set(),
        "runtime": {"config"},
        "files": {"runtime"},
        "run_folder": {"config", "runtime", "files"},
        "data": {"config", "runtime", "files"},
        "architectures": {"config", "runtime", "data"},
        "tasks": {"config", "runtime", "data", "architectures"},
        "optimizers": {"config", "runtime"},
        "model": {"config", "data", "architectures", "tasks", "optimizers"},
        "checkpoint": {"config", "runtime", "files", "run_folder", "data", "optimizers"},
        "distillation": {
            *("config", "files", "run_folder", "data", "architectures", "tasks", "model", "checkpoint"),
        },
        "metrics": {"files", "runtime", "run_folder", "tasks", "model"},
        "faults.hang": {"files", "runtime"},
        "faults.failure": {"config", "files", "runtime", "run_folder", "metrics", "faults.hang"},
        "faults.injection": {"config", "runtime", "run_folder", "data", "tasks"},
        "trackers": {"config", "runtime", "files", "run_folder", "metrics", "faults.hang"},
        "numerics": {"config", "data", "checkpoint", "trackers"},
        "report": {"config", "runtime", "files", "run_folder", "data", "checkpoint", "metrics", "faults.failure"},
        "doctor": set(),
        "parity": {"config", "runtime", "data", "architectures", "tasks", "optimizers", "model", "distillation"},
        "deploy": {
            *("config", "files", "run_folder", "data", "architectures", "tasks", "optimizers", "model", "checkpoint"),
            "metrics",
        },
        "serving": {"config", "data", "deploy"},
        "evaluation": {"config", "runtime", "files", "data", "tasks", "model", "checkpoint", "metrics", "deploy"},
        ".": {
            *("config", "runtime", "files", "run_folder", "data", "tasks", "optimizers", "model", "checkpoint"),
            *("metrics", "faults.hang", "faults.failure", "faults.injection", "trackers", "numerics", "report"),
            *("distillation", "doctor"),
        },
        "plan": {
            *("config", "runtime", "run_folder", "data", "tasks", "optimizers", "model", "checkpoint"),
            *("distillation", "."),
        },
        "commands": {
            *("config", "runtime", "run_folder", "data", "checkpoint", "trackers", "report", "doctor", "parity"),
            *("deploy", "serving", "evaluation"),
        },
    },
    "benchmarks": {
        "presentation": set(),
        ".": {"presentation"},
        "measure": {"presentation"},
        "contestants": {"presentation", "measure"},
        "checkpoint": {"presentation", "measure"},
        "collectives": {"presentation", "measure"},
        "data": {"presentation", "measure"},
        "device": {"presentation", "measure"},
        "memory": {"presentation", "measure"},
        "startup": {"presentation", "measure"},
        "quality": {"measure", "presentation"},
        "serving": {"measure", "presentation"},
        "overhead": {"presentation", "measure", "contestants"},
        "scaling": {"presentation", "measure", "contestants"},
        "throughput": {"presentation", "measure", "contestants"},
        "tune": {"presentation", "measure", "throughput"},
    },
}
SPINE = {
    *("__init__", "__main__", "rank", "ending", "build", "loop", "parts", "stages", "accumulation", "attempt"),
    "before_reading",
}
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
    "scipy",
    "sklearn",
    "torchao",
    "onnx",
    "onnxruntime",
    "launcher",
    "benchmarks",
    "shardline",
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


def _module(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imported_modules(path: Path, package: str) -> set[str]:
    """Modules of a package that one of its files imports anywhere."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == package:
            for alias in node.names:
                below = f"{node.module}.{alias.name}"
                found.add(below if (ROOT / below.replace(".", "/")).with_suffix(".py").exists() else str(node.module))
    return found - {_module(path)}


def _room(module: str) -> str:
    folder = ROOT / module.replace(".", "/")
    inside = module.split(".")[1:] if folder.is_dir() else module.split(".")[1:-1]
    return ".".join(inside) or "."


@pytest.mark.parametrize("package", ROOMS)
def test_rooms_import_what_they_may(package: str) -> None:
    found: dict[str, set[str]] = {room: set() for room in ROOMS[package]}
    for path in _sources(package):
        # The face of a room may show what lies in it.
        if path.name != "__init__.py" or path.parent == ROOT / package:
            room = _room(_module(path))
            found[room] |= {other for name in _imported_modules(path, package) if (other := _room(name)) != room}
    # What a room may import and does not is to be struck out.
    assert found == ROOMS[package]


@pytest.mark.parametrize("package", ROOMS)
def test_no_room_imports_upwards(package: str) -> None:
    rooms = list(ROOMS[package])
    for place, (room, allowed) in enumerate(ROOMS[package].items()):
        assert allowed <= set(rooms[:place]), room


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_make_no_circle(package: str) -> None:
    graph = {_module(path): _imported_modules(path, package) for path in _sources(package)}
    TopologicalSorter(graph).prepare()


def test_every_run_passes_through_what_lies_in_the_root_of_the_trainer() -> None:
    assert {path.stem for path in (ROOT / "trainer").glob("*.py")} == SPINE


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
    assert _loaded_by("import trainer.config, trainer.config.reference, trainer.attempt") & HEAVY == set()


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
