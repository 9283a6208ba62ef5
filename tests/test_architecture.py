"""What the code promises about itself: who imports whom, what is loaded when, and that every setting is read."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import ROOT, command_environment
from trainer.config import RunConfig, load_config
from trainer.config_docs import PAGE, render_page, sections

PACKAGES = ("sharding", "trainer", "launcher", "benchmarks")
ALLOWED = {
    "sharding": {"sharding"},
    "trainer": {"trainer", "sharding"},
    "launcher": {"launcher", "trainer", "sharding"},
    "benchmarks": {"benchmarks", "trainer", "sharding"},
}
CONFIG_MODULES = {"config.py", "sections.py", "config_docs.py"}


def _sources(package: str) -> Iterator[Path]:
    files = list((ROOT / package).rglob("*.py"))
    assert files
    yield from files


def _imported_modules(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_go_one_way(package: str) -> None:
    for path in _sources(package):
        for module in _imported_modules(ast.parse(path.read_text())):
            top = module.partition(".")[0]
            assert top not in PACKAGES or top in ALLOWED[package], f"{path} imports {module}"


def _loaded(statement: str) -> set[str]:
    code = f"{statement}\nimport sys\nprint(' '.join(sorted(sys.modules)))"
    finished = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=command_environment(), check=True
    )
    return set(finished.stdout.split())


def test_the_launcher_loads_no_torch() -> None:
    loaded = _loaded("import launcher.cli, launcher.run, launcher.local")
    assert "launcher.run" in loaded
    assert not loaded & {"torch", "transformers", "datasets", "wandb", "deepspeed", "accelerate"}


def test_a_rank_loads_optional_libraries_only_when_it_uses_them() -> None:
    loaded = _loaded("import trainer.rank")
    assert {"torch", "trainer.loop"} <= loaded
    assert not loaded & {"datasets", "wandb", "deepspeed", "accelerate", "launcher", "benchmarks"}


def _attribute_reads() -> set[tuple[str, str, str]]:
    """(file, what stands before the dot, attribute) of every attribute access outside the definitions."""
    reads = set()
    for package in PACKAGES:
        for path in _sources(package):
            if path.name in CONFIG_MODULES and path != ROOT / "trainer" / "config.py":
                continue
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                    base = node.value
                    name = base.id if isinstance(base, ast.Name) else getattr(base, "attr", "")
                    reads.add((str(path), name.lstrip("_"), node.attr))
    return reads


def test_every_setting_is_read_somewhere() -> None:
    reads = _attribute_reads()
    texts = {path: Path(path).read_text() for path, _, _ in reads}
    sections_taken = {(path, attribute) for path, _, attribute in reads}
    unread = []
    for section, model in sections(RunConfig):
        own_name = section.rpartition(".")[2] or "config"
        for field in model.model_fields:
            # As `config.batch.global_size`, or from a variable that can be this section in that file.
            if not any(
                attribute == field
                and (
                    base == own_name
                    or (
                        base in ("config", "settings", "self", "compilation")
                        and (model.__name__ in texts[path] or (path, own_name) in sections_taken)
                    )
                )
                for path, base, attribute in reads
            ):
                unread.append(f"{section}.{field}".lstrip("."))
    # These are read by name, in a loop over the axes that are not there yet.
    axes = ["parallel.tensor", "parallel.context", "parallel.pipeline"]
    assert 'for axis in ("tensor", "context", "pipeline")' in (ROOT / "trainer" / "config.py").read_text()
    assert [name for name in unread if name not in axes] == []
    assert [name for name in axes if name not in unread] == []


def test_every_setting_has_a_sentence() -> None:
    for path, model in sections(RunConfig):
        assert (model.__doc__ or "").strip().endswith("."), path
        for name, field in model.model_fields.items():
            assert (field.description or "").strip().endswith("."), f"{path}.{name}"


def test_the_configuration_page_is_current() -> None:
    assert PAGE.read_text() == render_page(), "run python -m trainer.config_docs"


def test_every_example_configuration_is_valid() -> None:
    files = sorted((ROOT / "configs").rglob("*.yaml"))
    assert len(files) >= 3
    for path in files:
        assert load_config(path).steps > 0
        assert f"configs/{path.name}" in path.read_text(), f"{path} does not say how to launch it"


def test_files_stay_small() -> None:
    for package in PACKAGES:
        for path in _sources(package):
            assert len(path.read_text().splitlines()) <= 400, path


def test_no_folder_has_the_name_of_a_library() -> None:
    libraries = {"torch", "deepspeed", "accelerate", "datasets", "transformers", "wandb", "utils"}
    for package in (*PACKAGES, "tests"):
        for path in (ROOT / package).rglob("*"):
            if "__pycache__" not in path.parts:
                assert path.stem not in libraries, path
