"""``import shardline``: quick, light, and Shardline's own packages whatever lies beside a script."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import shardline
from shardline import _MODULE_OF
from tests.support import ROOT, command_environment
from tests.test_architecture import HEAVY


def _python(*arguments: object, cwd: Path, **extra: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env=command_environment(**extra),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def _loaded_by(statement: str, cwd: Path) -> set[str]:
    finished = _python("-c", f"{statement}; import sys; print(*sys.modules)", cwd=cwd)
    assert finished.returncode == 0, finished.stderr
    return {name.partition(".")[0] for name in finished.stdout.split()}


def test_every_name_is_there_and_typed() -> None:
    assert sorted(shardline.__all__) == sorted(_MODULE_OF)
    for name in shardline.__all__:
        assert getattr(shardline, name) is getattr(shardline, name)
        assert name in dir(shardline)
    tree = ast.parse(Path(shardline.__file__).read_text())
    (typed,) = (node for node in tree.body if isinstance(node, ast.If))
    imports = [node for node in typed.body if isinstance(node, ast.ImportFrom)]
    assert {alias.name: node.module for node in imports for alias in node.names} == _MODULE_OF
    assert all((ROOT / package / "py.typed").exists() for package in ("shardline", "trainer", "sharding"))
    with pytest.raises(AttributeError, match="'shardline' has no attribute 'tain'"):
        shardline.tain  # noqa: B018


def test_neither_the_import_nor_a_configuration_loads_anything_heavy(tmp_path: Path) -> None:
    assert not _loaded_by("import shardline", tmp_path) & (HEAVY | {"pydantic", "rich"})
    given = '{"steps": 1, "model": {"architecture": "llama"}}'
    assert not _loaded_by(f"import shardline; shardline.load_config({given})", tmp_path) & HEAVY


def test_modules_beside_a_script_do_not_get_in_the_way(tmp_path: Path) -> None:
    for name in ("trainer", "sharding", "launcher"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the one beside the script')")
    (tmp_path / "script.py").write_text(
        "import shardline\n"
        "from trainer.config import load_config\n"
        "print(shardline.load_config({'steps': 1, 'model': {'architecture': 'llama'}}).num_steps, load_config)\n"
    )
    finished = _python("script.py", cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.startswith("1 <function load_config")


@pytest.mark.parametrize("planted", ["trainer.py", "sharding/__init__.py"])
def test_one_that_was_imported_before_is_named(tmp_path: Path, planted: str) -> None:
    file = tmp_path / planted
    file.parent.mkdir(exist_ok=True)
    file.write_text("")
    name = planted.partition("/")[0].removesuffix(".py")
    (tmp_path / "script.py").write_text(f"import {name}\nimport shardline\n")
    finished = _python("script.py", cwd=tmp_path)
    assert finished.returncode == 1
    said = f"shardline needs its own package {name}, but a module of this name is loaded already, from {file}; call"
    assert finished.stderr.strip().splitlines()[-1] == f"ImportError: {said} that one otherwise."
